# Objects compiled for one instruction set must not carry inline functions that others could be linked to:
# of several copies a linker keeps one, and a processor without AVX-512 must never meet the copy that needs it.
#
#   cmake -DNM=nm -DOBJECTS=a.o;b.o -P check_isa.cmake
set(found "")
set(looked 0)
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "_(avx2|avx512)\\.cpp")
    continue()
  endif()
  math(EXPR looked "${looked} + 1")
  execute_process(COMMAND ${NM} --demangle --defined-only ${object}
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]+" weak "${symbols}")
  cmake_path(GET object FILENAME name)
  foreach(symbol IN LISTS weak)
    string(REGEX REPLACE "^[0-9a-f]+ . " "" symbol "${symbol}")
    string(APPEND found "  ${name}: ${symbol}\n")
  endforeach()
endforeach()
if(found)
  message(FATAL_ERROR "functions that another file could be linked to; put them into an unnamed namespace, "
    "or mark them always_inline:\n${found}")
endif()
message(STATUS "${looked} objects, no weak symbol")
