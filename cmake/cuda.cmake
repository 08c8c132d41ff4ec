# _cuda: the CUDA kernels. The CUDA runtime is linked statically, so that the module loads where there is no GPU.

if(DEFINED ENV{CUDACXX} AND EXISTS "$ENV{CUDACXX}")
  set(FASTRNN_NVCC $ENV{CUDACXX})
endif()
find_program(FASTRNN_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin)
if(NOT FASTRNN_NVCC)
  message(FATAL_ERROR "FASTRNN_CUDA asks for the CUDA kernels, but nvcc was not found (CUDACXX, CUDA_HOME, PATH)")
endif()

set(CMAKE_CUDA_COMPILER ${FASTRNN_NVCC})
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(architectures "80;90a;100;120")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8 AND NOT FASTRNN_CUDA_ARCHS)
  message(WARNING "nvcc ${CMAKE_CUDA_COMPILER_VERSION} has no sm_100 and sm_120, which need 12.8: only sm_80 and sm_90a")
  set(architectures "80;90a")
endif()
set(FASTRNN_CUDA_ARCHS ${architectures} CACHE STRING "Compute capabilities that the kernels are compiled for")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8 AND FASTRNN_CUDA_ARCHS MATCHES "1[0-9][0-9]")
  message(FATAL_ERROR "nvcc ${CMAKE_CUDA_COMPILER_VERSION} has no sm_100 and sm_120, which need 12.8: set FASTRNN_CUDA_ARCHS=\"80;90a\"")
endif()

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
set(newest 0)
foreach(arch ${FASTRNN_CUDA_ARCHS})
  list(APPEND generate "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
  if(arch MATCHES "^[0-9]+$" AND arch GREATER newest) # 90a and the like have no PTX that others could use
    set(newest ${arch})
  endif()
endforeach()
# And PTX of the newest one, for GPUs that are newer still. Not of one without clusters: there K1's kernels for clusters are
# empty, and a GPU that has clusters would be given them.
if(newest GREATER_EQUAL 90)
  list(APPEND generate "SHELL:-gencode arch=compute_${newest},code=compute_${newest}")
endif()
target_compile_options(
  _cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${generate} --fatbin-options=--compress-all>
                $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
target_link_options(_cuda PRIVATE -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/cuda_exports.map
                    -Wl,--exclude-libs,ALL -Wl,-s)
install(TARGETS _cuda LIBRARY DESTINATION fastrnn COMPONENT engine)
