// Every cell, in one list: loops, dispatch tables and tests follow it.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

#define FASTRNN_FOR_EACH_CELL(DO) DO(Lstm) DO(Gru) DO(RnnTanh) DO(RnnRelu)
