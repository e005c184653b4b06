# SPDX-License-Identifier: MIT
"""When a program that a test runs may be sent a signal: not after some time, which a busy machine
takes for other things, but once it is as far as the test wants it."""
import fcntl
import struct
import termios
import time

TIMEOUT = 60
PAUSE = 0.05


def wait_until_caught(process, number):
    """Until the program has a handler for the signal (Linux; elsewhere a second)."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode} before the signal")
        try:
            with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
                caught = next(line for line in status if line.startswith("SigCgt:"))
        except FileNotFoundError:
            time.sleep(1)
            return
        if int(caught.split()[1], 16) >> (number - 1) & 1:
            return
        time.sleep(PAUSE)
    raise AssertionError("it catches no signal")


def wait_until_unread(process):
    """Until the program has filled its standard output, a pipe that nobody reads."""
    deadline = time.monotonic() + TIMEOUT
    held = []  # bytes, at the last few looks
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode} before its output was full")
        found = fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4))
        held = held[-9:] + [struct.unpack("i", found)[0]]
        if held[0] > 32768 and len(held) == 10 and held[0] == held[-1]:
            return
        time.sleep(PAUSE)
    raise AssertionError(f"its output holds {held[-1]} bytes")


def signal_unread(process, number, timeout=20):
    """Sends the signal to a program that waits for a reader of its output; returns its status, which
    it has to give without one. What it had written can be read then."""
    try:
        wait_until_unread(process)
        process.send_signal(number)
        return process.wait(timeout=timeout)
    finally:
        process.kill()
