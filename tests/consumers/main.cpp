// SPDX-License-Identifier: MIT
#include <sluice/sluice.hpp>

const sluice::Version* version_of_other_unit();
#if CONSUMER_WITH_IO
bool readers_are_linked();
#else
static bool readers_are_linked() { return true; }
#endif

int main() {
  sluice::ThreadTeam team(2);  // threads must have been linked
  sluice::Buffer<int> ran(2);
  team.run([&](int member, int) { ran[static_cast<std::size_t>(member)] = 1; });
  const bool one_library = version_of_other_unit() == &sluice::kVersion;
  return one_library && ran[0] == 1 && ran[1] == 1 && readers_are_linked() ? 0 : 1;
}
