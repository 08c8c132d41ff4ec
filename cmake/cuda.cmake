# _cuda: the CUDA kernels, built where nvcc is found; FASTRNN_CUDA=OFF leaves them out. The CUDA runtime is linked
# statically, so that the module loads where there is no GPU.

set(FASTRNN_CUDA_ARCHS "80;90a;100;120" CACHE STRING "Compute capabilities that the kernels are compiled for")
find_program(FASTRNN_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME PATH_SUFFIXES bin)
if(NOT FASTRNN_NVCC)
  message(STATUS "nvcc was not found: fastrnn is built without its CUDA kernels")
  return()
endif()

set(CMAKE_CUDA_COMPILER ${FASTRNN_NVCC})
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

include(cmake/instances.cmake)
fastrnn_instances(cuda_kernels cu)
pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/bindings/cuda.cpp csrc/bindings/gpu.cpp csrc/cuda/plan.cpp
                    csrc/cuda/launch.cu ${cuda_kernels})
target_include_directories(_cuda PRIVATE csrc)
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
set_target_properties(_cuda PROPERTIES CUDA_STANDARD 17 CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
string(REPLACE ";" " " architectures "${FASTRNN_CUDA_ARCHS}")
target_compile_definitions(_cuda PRIVATE FASTRNN_CUDA_ARCHS="${architectures}")

set(generate)
foreach(arch ${FASTRNN_CUDA_ARCHS})
  list(APPEND generate "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
endforeach()
target_compile_options(
  _cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${generate} --fatbin-options=--compress-all -Xptxas=-v>
                $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
target_link_options(_cuda PRIVATE -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/cuda_exports.map
                    -Wl,--exclude-libs,ALL -Wl,-s)
install(TARGETS _cuda LIBRARY DESTINATION fastrnn COMPONENT engine)
