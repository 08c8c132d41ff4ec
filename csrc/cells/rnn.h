// The simple recurrent network; equations and source in fastrnn/cells/rnn.py, in the same symbols.
#pragma once

#include "cells/math.h"

namespace fastrnn {

struct RnnBase {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;  // h
  static constexpr int kTape = 0;
  static constexpr int kSplit = 0;
  static constexpr int kParams = 0;  // vectors of one value a unit, such as peepholes
  static constexpr bool kReadsH = true;
  static constexpr bool kProjects = false;  // may h be projected?
  static constexpr bool kReadsPreviousH = false;
};

struct RnnTanh : RnnBase {
  static constexpr const char* kName = "rnn_tanh";

  template <class F>
  static FASTRNN_HD void step(const F (&a)[1], const F (&)[1], const F*, F (&s1)[1], F*) {
    s1[0] = tanh(a[0]);
  }
  template <class F>
  static FASTRNN_HD void step_backward(const F*, const F (&)[1], const F (&s1)[1], const F*, F (&ds)[1], F (&d)[1],
                                       F*) {
    d[0] = ds[0] * (F(1) - s1[0] * s1[0]);
    ds[0] = F(0);
  }
};

struct RnnRelu : RnnBase {
  static constexpr const char* kName = "rnn_relu";

  template <class F>
  static FASTRNN_HD void step(const F (&a)[1], const F (&)[1], const F*, F (&s1)[1], F*) {
    s1[0] = where(a[0] <= F(0), F(0), a[0]);  // in this form a NaN stays a NaN
  }
  template <class F>
  static FASTRNN_HD void step_backward(const F*, const F (&)[1], const F (&s1)[1], const F*, F (&ds)[1], F (&d)[1],
                                       F*) {
    d[0] = where(s1[0] <= F(0), F(0), ds[0]);
    ds[0] = F(0);
  }
};

}  // namespace fastrnn
