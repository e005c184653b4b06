# SPDX-License-Identifier: MIT
#
# Builds and runs a user's program that gets sluice in one WAY: find_package (installed into an empty
# prefix), add_subdirectory, or fetch_content (from a packed copy, through a file URL).

function(run)
  execute_process(
    COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    list(JOIN ARGN " " command)
    message("${output}")
    message(FATAL_ERROR "${command}\nended with ${status}")
  endif()
endfunction()

set(work ${SLUICE_BINARY}/consumers/${WAY})
file(REMOVE_RECURSE ${work})
file(MAKE_DIRECTORY ${work})

if(WAY STREQUAL "find_package")
  set(ENV{DESTDIR})
  run(${CMAKE_COMMAND} --install ${SLUICE_BINARY} --prefix ${work}/built)
  # Moved, so that a path of the build machine in the package files would be noticed.
  file(RENAME ${work}/built ${work}/prefix)
  set(how -D CMAKE_PREFIX_PATH=${work}/prefix)
elseif(WAY STREQUAL "add_subdirectory")
  set(how -D SLUICE_SOURCE=${SLUICE_SOURCE})
else()
  set(archive ${work}/sluice.tar.gz)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E tar czf ${archive} CMakeLists.txt LICENSE cmake include
    WORKING_DIRECTORY ${SLUICE_SOURCE} COMMAND_ERROR_IS_FATAL ANY)
  set(how -D SLUICE_URL=file://${archive})
endif()

run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/${WAY} -B ${work}/build -G ${GENERATOR}
    -D CMAKE_CXX_COMPILER=${COMPILER} -D WITH_IO=${WITH_IO}
    -D WITH_AUDIO=${WITH_AUDIO} ${how})
run(${CMAKE_COMMAND} --build ${work}/build)
run(${work}/build/consumer)
