#define FASTRNN_ISA avx512
#include "cpu/isa.inl"
