// Gated recurrent unit; equations and source in fastrnn/cells/gru.py, in the same symbols.
#pragma once

#include "cells/math.h"

namespace fastrnn {

struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3;   // r z n
  static constexpr int kStates = 1;  // h
  static constexpr int kTape = 4;    // r z n, and the recurrent pre-activation of n
  static constexpr int kSplit = 1;   // the last gate, n: r stands between its x and its h part
  static constexpr int kParams = 0;  // vectors of one value a unit, such as peepholes
  static constexpr bool kReadsH = false;
  static constexpr bool kProjects = false;  // may h be projected?
  static constexpr bool kReadsPreviousH = true;

  // a: x + r of the reset and update gates, then x of n, then r of n.
  template <class F>
  static FASTRNN_HD void step(const F (&a)[4], const F (&s)[1], const F*, F (&s1)[1], F (&tape)[4]) {
    const F r = sigmoid(a[0]), z = sigmoid(a[1]), n = tanh(a[2] + r * a[3]);
    s1[0] = n + z * (s[0] - n);
    tape[0] = r, tape[1] = z, tape[2] = n, tape[3] = a[3];
  }

  template <class F>
  static FASTRNN_HD void step_backward(const F (&tape)[4], const F (&s)[1], const F (&)[1], const F*, F (&ds)[1],
                                       F (&d)[4], F*) {
    const F r = tape[0], z = tape[1], n = tape[2], hn = tape[3], one = F(1);
    const F dn = ds[0] * (one - z) * (one - n * n);
    d[0] = dn * hn * r * (one - r);
    d[1] = ds[0] * (s[0] - n) * z * (one - z);
    d[2] = dn;
    d[3] = dn * r;
    ds[0] = ds[0] * z;
  }
};

}  // namespace fastrnn
