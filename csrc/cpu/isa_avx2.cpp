#define FASTRNN_ISA avx2
#include "cpu/isa.inl"
