# The fuzz driver finds what coverage leads to, keeps it, and does not find it when it is blind.
#
#   cmake -DCONTROL=path/of/control -DFOLDER=scratch -P check_driver.cmake
file(REMOVE_RECURSE ${FOLDER})
file(MAKE_DIRECTORY ${FOLDER}/corpus)
cmake_path(GET CONTROL FILENAME name)

# Runs the control with the arguments that follow; fails unless it ends with `wanted` and says `pattern`.
function(expect wanted pattern)
  execute_process(COMMAND ${CONTROL} ${ARGN} WORKING_DIRECTORY ${FOLDER} TIMEOUT 60
    RESULT_VARIABLE result OUTPUT_VARIABLE said ERROR_VARIABLE said)
  message(STATUS "${ARGN}: ended with ${result}\n${said}")
  if(NOT result STREQUAL wanted OR NOT said MATCHES "${pattern}")
    message(FATAL_ERROR "not ${wanted} and '${pattern}'")
  endif()
endfunction()

set(limits -runs=1000000 -max_len=64)
foreach(seed RANGE 1 3)
  expect(0 "DONE cov: 0 " ${limits} -seed=${seed} -coverage=0 corpus)
  file(REMOVE ${FOLDER}/crash-${name})
  expect(1 "planted fault.*kept in ./crash-${name}" ${limits} -seed=${seed} corpus)
endforeach()
expect(1 "planted fault" crash-${name})
# What a run keeps, the next one starts from.
expect(0 "DONE cov: [1-9]" -runs=20000 -max_len=64 -grow=1 corpus)
file(GLOB kept ${FOLDER}/corpus/*)
list(LENGTH kept count)
expect(0 "#${count}.DONE cov: [1-9]" -runs=0 corpus)
