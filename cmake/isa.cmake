# The instruction sets of the engine: one source file each, compiled with that set's flags. Which one
# runs is decided at run time, so no flag may reach any other file (and never -march=native).

if(FASTRNN_BASELINE_ONLY)
  set(FASTRNN_X86 FALSE)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  set(FASTRNN_X86 TRUE)
else()
  set(FASTRNN_X86 FALSE)
endif()

set(FASTRNN_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(FASTRNN_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FASTRNN_FLAGS_avx512 ${FASTRNN_AVX512})
set(FASTRNN_FLAGS_avx512bf16 ${FASTRNN_AVX512} -mavx512bf16)

# Sets `out` to the files of the instruction sets beyond the baseline, the most common set first.
function(fastrnn_isa_sources out)
  set(sources)
  if(FASTRNN_X86)
    foreach(isa avx2 avx512 avx512bf16)
      set(source csrc/cpu/isa_${isa}.cpp)
      if(NOT EXISTS ${PROJECT_SOURCE_DIR}/${source})
        continue() # an instruction set that has no code of its own yet
      endif()
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${FASTRNN_FLAGS_${isa}}")
      list(APPEND sources ${source})
    endforeach()
  endif()
  set(${out} ${sources} PARENT_SCOPE)
endfunction()
