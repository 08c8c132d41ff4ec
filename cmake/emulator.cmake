# _emulator: the CUDA kernels compiled by the C++ compiler, on csrc/emulator. For the tests, never installed.
#   cmake -S . -B build/emulator -G Ninja -DFASTRNN_EMULATOR=ON ... && cmake --build build/emulator --target _emulator

file(GLOB emulator_machine CONFIGURE_DEPENDS csrc/emulator/*.cpp)
list(FILTER emulator_machine EXCLUDE REGEX "/primitives\\.cpp$")
include(cmake/instances.cmake)
fastrnn_instances(emulator_kernels cpp)
list(APPEND emulator_kernels csrc/emulator/primitives.cpp)

pybind11_add_module(_emulator MODULE NO_EXTRAS EXCLUDE_FROM_ALL csrc/bindings/emulator.cpp csrc/bindings/gpu.cpp
                    csrc/cuda/plan.cpp ${emulator_machine} ${emulator_kernels})
target_include_directories(_emulator PRIVATE csrc)
target_compile_options(_emulator PRIVATE -g1 -Wall -Wextra -Wno-unknown-pragmas)
target_link_libraries(_emulator PRIVATE ${CMAKE_DL_LIBS})
if(FASTRNN_SANITIZE)
  target_compile_options(
    _emulator PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr -O1)
  target_link_options(_emulator PRIVATE -fsanitize=address,undefined)
  # Not of what others stand for: fp16 has the kernels of bf16 but for conversions, ReLU those of tanh but for one function.
  set(alike ${emulator_kernels})
  list(FILTER alike INCLUDE REGEX "_Fp16|_RnnRelu_")
  set_source_files_properties(${alike} PROPERTIES COMPILE_OPTIONS -fno-sanitize=all)
else()
  # Loads and stores of the kernels call csrc/emulator/hooks.cpp; ThreadSanitizer itself is not linked.
  set_source_files_properties(${emulator_kernels} PROPERTIES COMPILE_OPTIONS "-fsanitize=thread;-O1")
  target_compile_definitions(_emulator PRIVATE FASTRNN_DETECTS_RACES=1)
endif()
