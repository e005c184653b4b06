# SPDX-License-Identifier: MIT
#
# Compiles SOURCE with COMMAND_LINE and the include folders INCLUDES. Passes when the compiler
# refuses it with a text that matches the first line of SOURCE: `// expect: <regex>`.

file(STRINGS "${SOURCE}" first_line LIMIT_COUNT 1)
if(NOT first_line MATCHES "^// expect: (.+)$")
  message(FATAL_ERROR "${SOURCE}: the first line must read '// expect: <regex>'")
endif()
set(expected "${CMAKE_MATCH_1}")

list(TRANSFORM INCLUDES PREPEND -I)
execute_process(
  COMMAND ${COMMAND_LINE} ${INCLUDES} "${SOURCE}"
  RESULT_VARIABLE status
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output)

if(status EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiled, but must not")
endif()
if(NOT output MATCHES "${expected}")
  message("${output}")
  message(FATAL_ERROR "${SOURCE} failed, but not with '${expected}'")
endif()
