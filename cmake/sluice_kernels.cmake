# SPDX-License-Identifier: MIT
#
# sluice::kernels: the CPU kernels in a static library. It is built with the flags of the project that
# it is part of, when something links it; it must not be given another -march than the units that
# include sluice, with which it shares inline functions. With SLUICE_KERNEL_TARGETS it holds kernels
# for several instruction sets, hidden from each other and from the rest, and picks at start:
# SLUICE_KERNEL_TARGETS=native makes the kernels, and nothing else, as fast as this machine allows.
# It is not installed: a library fits one architecture, the package fits all of them.
include_guard()
include(CheckCXXCompilerFlag)

set(SLUICE_KERNEL_TARGETS "" CACHE STRING
    "Instruction sets (-march=) of sluice::kernels beside the project's own, the best one last: \
x86-64-v3;x86-64-v4. What the processor has is found at start")

# sluice_kernel_object(<target> <file>): kernels for one instruction set as one object file that
# shows its table alone: what it has compiled of the standard library and of ours, with instructions
# that the processor may lack, must not stand in for the copies of other units.
function(sluice_kernel_object kernel_target file)
  string(MAKE_C_IDENTIFIER "sluice_kernels_${kernel_target}" kernel_symbol)
  set(source ${PROJECT_BINARY_DIR}/kernels/${kernel_symbol}.cpp)
  configure_file(${PROJECT_SOURCE_DIR}/cmake/kernel_table.cpp.in ${source} @ONLY)
  add_library(${kernel_symbol} OBJECT EXCLUDE_FROM_ALL ${source})
  target_compile_definitions(${kernel_symbol} PRIVATE SLUICE_COMPILED_KERNELS=1)
  target_link_libraries(${kernel_symbol} PRIVATE sluice)
  # Unique symbols could not be hidden.
  target_compile_options(
    ${kernel_symbol} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fno-gnu-unique>)
  # ld -r and objcopy need machine code, and whatever links it may be a shared library.
  set_target_properties(${kernel_symbol} PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF
                                                    POSITION_INDEPENDENT_CODE ON)
  if(NOT kernel_target STREQUAL "baseline")
    target_compile_options(${kernel_symbol} PRIVATE -march=${kernel_target})
  endif()
  set(object ${PROJECT_BINARY_DIR}/kernels/${kernel_symbol}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CMAKE_LINKER} -r --force-group-allocation -o ${object}
            $<TARGET_OBJECTS:${kernel_symbol}>
    COMMAND ${CMAKE_OBJCOPY} --keep-global-symbol=${kernel_symbol} ${object}
    DEPENDS ${kernel_symbol} $<TARGET_OBJECTS:${kernel_symbol}>
    COMMAND_EXPAND_LISTS VERBATIM)
  set(${file} ${object} PARENT_SCOPE)
endfunction()

set(kernel_sources "")
set(sluice_kernel_names "")  # also read by tests/
set(kernel_targets ${SLUICE_KERNEL_TARGETS})
if(kernel_targets AND SLUICE_SANITIZE)
  message(STATUS "sluice: SLUICE_KERNEL_TARGETS is left out, a sanitizer build has one of them")
  set(kernel_targets "")
elseif(kernel_targets AND (NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR NOT CMAKE_OBJCOPY
                           OR NOT CMAKE_LINKER))
  message(STATUS "sluice: SLUICE_KERNEL_TARGETS is left out, it needs GCC and the GNU binutils")
  set(kernel_targets "")
endif()
if(kernel_targets)
  set(kernel_declarations "")
  set(kernel_tables "")
  foreach(kernel_target IN ITEMS baseline LISTS kernel_targets)
    if(NOT kernel_target STREQUAL "baseline")
      string(MAKE_C_IDENTIFIER "SLUICE_COMPILER_KNOWS_${kernel_target}" knows)
      check_cxx_compiler_flag(-march=${kernel_target} ${knows})
      if(NOT ${knows})
        message(STATUS "sluice: no kernels for ${kernel_target}, which the compiler does not know")
        continue()
      endif()
    endif()
    sluice_kernel_object(${kernel_target} object)
    list(APPEND kernel_sources ${object})
    list(APPEND sluice_kernel_names ${kernel_target})
    string(MAKE_C_IDENTIFIER "sluice_kernels_${kernel_target}" symbol)
    string(APPEND kernel_declarations "extern const sluice::detail::KernelTable ${symbol};\n")
    string(APPEND kernel_tables "&${symbol}, ")
  endforeach()
  list(JOIN sluice_kernel_names ", " kernel_names)
  set(source ${PROJECT_BINARY_DIR}/kernels/dispatch.cpp)
  configure_file(${PROJECT_SOURCE_DIR}/cmake/kernel_dispatch.cpp.in ${source} @ONLY)
  set_source_files_properties(${kernel_sources} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  # The kernels call ThreadTeam's functions, which must stand there to be called.
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS -fno-inline)
  list(APPEND kernel_sources ${source})
else()
  foreach(part IN ITEMS "backend/cpu/attend_work" "backend/cpu/linear" "nn/norm")
    cmake_path(GET part FILENAME name)
    set(source ${PROJECT_BINARY_DIR}/kernels/${name}.cpp)
    set(content "#define SLUICE_KERNELS_IMPLEMENTATION\n#include <sluice/${part}.hpp>\n")
    if(name STREQUAL "norm")  # and what else goes row by row
      string(APPEND content "#include <sluice/backend/cpu/kernel_table.hpp>\n"
                            "#include <sluice/nn/activation.hpp>\n")
    endif()
    file(CONFIGURE OUTPUT ${source} CONTENT "${content}")
    list(APPEND kernel_sources ${source})
  endforeach()
endif()

add_library(sluice_kernels STATIC EXCLUDE_FROM_ALL ${kernel_sources})
if(kernel_targets)
  set_target_properties(sluice_kernels PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF)
endif()
add_library(sluice::kernels ALIAS sluice_kernels)
target_compile_definitions(sluice_kernels PUBLIC SLUICE_COMPILED_KERNELS=1)
target_link_libraries(sluice_kernels PUBLIC sluice)

# What our own programs link: the compiled kernels, with our flags, or the headers alone.
function(sluice_own_kernels)
  add_library(sluice_own_kernels INTERFACE)
  target_link_libraries(sluice_kernels PRIVATE $<BUILD_INTERFACE:sluice_own_flags>)
  if(SLUICE_LINK_KERNELS)
    target_link_libraries(sluice_own_kernels INTERFACE sluice_kernels)
  endif()
endfunction()
