# SPDX-License-Identifier: MIT
#
# Every header compiles alone, included twice; all headers together may be linked with each of them
# alone. Parsing is the whole cost: nothing is optimised.
include_guard()

set(checks_dir ${PROJECT_BINARY_DIR}/header_checks)
set(check_sources "")
set(all_headers "")

file(GLOB_RECURSE check_headers
     RELATIVE ${PROJECT_SOURCE_DIR}/include CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/*.hpp)
foreach(header IN LISTS check_headers)
  if("/${header}" MATCHES "${SLUICE_IO_HEADER_REGEX}" AND NOT TARGET sluice::io)
    continue()
  endif()
  if("/${header}" MATCHES "${SLUICE_AUDIO_HEADER_REGEX}" AND NOT TARGET sluice::audio)
    continue()
  endif()
  string(REPLACE "/" "_" name ${header})
  set(source ${checks_dir}/${name}.cpp)
  file(CONFIGURE OUTPUT ${source}
       CONTENT "#include <${header}>\n#include <${header}>\n")
  list(APPEND check_sources ${source})
  string(APPEND all_headers "#include <${header}>\n")
endforeach()

add_library(sluice_header_checks OBJECT ${check_sources})

file(CONFIGURE OUTPUT ${checks_dir}/all_headers.cpp
     CONTENT "${all_headers}const void* other_unit();
int main() { return other_unit() == &sluice::kVersion ? 0 : 1; }\n")
file(CONFIGURE OUTPUT ${checks_dir}/other_unit.cpp
     CONTENT "#include <sluice/core/version.hpp>
const void* other_unit();
const void* other_unit() { return &sluice::kVersion; }\n")
add_executable(sluice_link_check ${checks_dir}/all_headers.cpp ${checks_dir}/other_unit.cpp
                                 $<TARGET_OBJECTS:sluice_header_checks>)
add_test(NAME two_units COMMAND sluice_link_check)
set_tests_properties(two_units PROPERTIES LABELS build TIMEOUT 60)

foreach(target IN ITEMS sluice_header_checks sluice_link_check)
  target_link_libraries(${target} PRIVATE sluice::sluice sluice_own_flags)
  if(TARGET sluice::io)
    target_link_libraries(${target} PRIVATE sluice::io)
  endif()
  if(TARGET sluice::audio)
    target_link_libraries(${target} PRIVATE sluice::audio)
  endif()
  target_compile_options(${target} PRIVATE -O0 -g0)
endforeach()
