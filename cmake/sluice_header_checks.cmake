# SPDX-License-Identifier: MIT
#
# Every header compiles alone, included twice; all headers together may be linked with each of them
# alone. Parsing is the whole cost: nothing is optimised, and what many headers include is parsed
# once.
#
# A header compiles alone when its own lines find all they name in what it includes, and each of
# those compiles alone. So it may be compiled behind a precompiled header that it includes anyway:
# nothing more is visible to its lines than without. Which one is decided by each configuration anew.
include_guard()

set(checks_dir ${PROJECT_BINARY_DIR}/header_checks)
set(all_headers "")

# Those that are precompiled, which pays from about ten users on; the longest first: a header takes
# the first that serves it.
set(check_prefixes sluice/model/decoder.hpp sluice/attention/attend.hpp
                   sluice/nn/weight_matrix.hpp sluice/core/byte_stream.hpp sluice/core/view.hpp)

# sluice_own_includes(<header> <early> <all>): the headers of ours that <header> includes whatever is
# defined: before its first declaration, and in the whole file.
function(sluice_own_includes header early all)
  set(include_lines "")
  set(early_lines "")
  set(depth 0)
  set(before ON)
  file(STRINGS ${PROJECT_SOURCE_DIR}/include/${header} lines
       REGEX "^( *# *(if|endif|include \"sluice/)|namespace|template|struct|class|inline)")
  foreach(line IN LISTS lines)
    if(line MATCHES "^ *# *if")
      math(EXPR depth "${depth} + 1")
    elseif(line MATCHES "^ *# *endif")
      math(EXPR depth "${depth} - 1")
    elseif(NOT line MATCHES "^ *#")
      set(before OFF)
    elseif(depth EQUAL 0 AND line MATCHES "\"(sluice/[^\"]*)\"")
      list(APPEND include_lines ${CMAKE_MATCH_1})
      if(before)
        list(APPEND early_lines ${CMAKE_MATCH_1})
      endif()
    endif()
  endforeach()
  set(${early} "${early_lines}" PARENT_SCOPE)
  set(${all} "${include_lines}" PARENT_SCOPE)
endfunction()

# sluice_reached_from(<result> <header>...): the headers given and all that they include. Reads
# all_of_<header>.
function(sluice_reached_from result)
  set(reached "")
  set(open ${ARGN})
  while(open)
    list(POP_FRONT open header)
    if(NOT header IN_LIST reached)
      list(APPEND reached ${header})
      list(APPEND open ${all_of_${header}})
    endif()
  endwhile()
  set(${result} "${reached}" PARENT_SCOPE)
endfunction()

file(GLOB_RECURSE check_headers
     RELATIVE ${PROJECT_SOURCE_DIR}/include CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/*.hpp)
foreach(header IN LISTS check_headers)
  sluice_own_includes(${header} early_of_${header} all_of_${header})
endforeach()
foreach(prefix IN LISTS check_prefixes)
  sluice_reached_from(reached_from_${prefix} ${prefix})
endforeach()

set(check_targets "")
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
  string(APPEND all_headers "#include <${header}>\n")

  set(target sluice_header_checks)
  set(precompiled "")
  sluice_reached_from(reached ${early_of_${header}})
  foreach(prefix IN LISTS check_prefixes)
    if(prefix IN_LIST reached AND NOT header IN_LIST reached_from_${prefix})
      cmake_path(GET prefix STEM stem)
      set(target sluice_header_checks_${stem})
      set(precompiled <${prefix}>)
      break()
    endif()
  endforeach()
  if(NOT TARGET ${target})
    add_library(${target} OBJECT ${source})
    list(APPEND check_targets ${target})
    if(precompiled)
      target_precompile_headers(${target} PRIVATE ${precompiled})
    endif()
  else()
    target_sources(${target} PRIVATE ${source})
  endif()
endforeach()

file(CONFIGURE OUTPUT ${checks_dir}/all_headers.cpp
     CONTENT "${all_headers}const void* other_unit();
int main() { return other_unit() == &sluice::kVersion ? 0 : 1; }\n")
file(CONFIGURE OUTPUT ${checks_dir}/other_unit.cpp
     CONTENT "#include <sluice/core/version.hpp>
const void* other_unit();
const void* other_unit() { return &sluice::kVersion; }\n")
add_executable(sluice_link_check ${checks_dir}/all_headers.cpp ${checks_dir}/other_unit.cpp)
add_test(NAME two_units COMMAND sluice_link_check)
set_tests_properties(two_units PROPERTIES LABELS build TIMEOUT 60)

foreach(target IN LISTS check_targets)
  target_sources(sluice_link_check PRIVATE $<TARGET_OBJECTS:${target}>)
endforeach()
foreach(target IN ITEMS ${check_targets} sluice_link_check)
  target_link_libraries(${target} PRIVATE sluice::sluice sluice_own_flags)
  if(TARGET sluice::io)
    target_link_libraries(${target} PRIVATE sluice::io)
  endif()
  if(TARGET sluice::audio)
    target_link_libraries(${target} PRIVATE sluice::audio)
  endif()
  target_compile_options(${target} PRIVATE -O0 -g0)
endforeach()
