#define FASTRNN_ISA baseline
#include "cpu/isa.inl"
