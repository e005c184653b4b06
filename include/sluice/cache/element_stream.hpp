// SPDX-License-Identifier: MIT
/// Cached rows in snapshots: elements as their bits, little-endian, in order.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>
#include <type_traits>

#include "sluice/cache/kv_element.hpp"
#include "sluice/core/byte_stream.hpp"

namespace sluice::detail {

template <class T>
void put_element(ByteWriter& writer, const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    writer.write<T>(value);
  } else if constexpr (std::is_same_v<T, GroupScale>) {
    put_element(writer, value.scale);
    put_element(writer, value.zero);
  } else {
    writer.write(value.bits);
  }
}

/// \throws Error(kFormat) where the data ends.
template <class T>
void get_element(ByteReader& reader, T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    value = reader.read<T>("cache row");
  } else if constexpr (std::is_same_v<T, GroupScale>) {
    get_element(reader, value.scale);
    get_element(reader, value.zero);
  } else {
    value.bits = reader.read<decltype(value.bits)>("cache row");
  }
}

/// Copies a buffer to `to`, bytes as they are; returns what follows there. Precondition: room.
template <class Buffer>
std::byte* pack(const Buffer& buffer, std::byte* to) {
  if (buffer.bytes() > 0) std::memcpy(to, buffer.data(), buffer.bytes());
  return to + buffer.bytes();
}
/// The inverse.
template <class Buffer>
const std::byte* unpack(const std::byte* from, Buffer& buffer) {
  if (buffer.bytes() > 0) std::memcpy(buffer.data(), from, buffer.bytes());
  return from + buffer.bytes();
}

template <class T>
void put_elements(ByteWriter& writer, std::span<const T> values) {
  for (const T& value : values) put_element(writer, value);
}
template <class T>
void get_elements(ByteReader& reader, std::span<T> values) {
  for (T& value : values) get_element(reader, value);
}

}  // namespace sluice::detail
