// Long short-term memory; equations and source in fastrnn/cells/lstm.py, in the same symbols.
#pragma once

#include "cells/math.h"

namespace fastrnn {

struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4;         // i f g o, rows of the weights
  static constexpr int kStates = 2;        // h c
  static constexpr int kTape = 4;          // i f g o, activated
  static constexpr int kSplit = 0;         // gates whose dx and dr differ
  static constexpr int kParams = 0;        // vectors of one value a unit, such as peepholes
  static constexpr bool kReadsH = false;   // does step or step_backward read h?
  static constexpr bool kProjects = true;  // may h be projected?
  static constexpr bool kReadsPreviousH = false;

  // a: pre-activations x + r.  s, s1: states before and after.  The pointer: kParams values of the unit, unread
  // where there are none.
  template <class F>
  static FASTRNN_HD void step(const F (&a)[4], const F (&s)[2], const F*, F (&s1)[2], F (&tape)[4]) {
    const F i = sigmoid(a[0]), f = sigmoid(a[1]), g = tanh(a[2]), o = sigmoid(a[3]);
    const F c = f * s[1] + i * g;
    s1[0] = o * tanh(c);
    s1[1] = c;
    tape[0] = i, tape[1] = f, tape[2] = g, tape[3] = o;
  }

  // ds: gradient of s1 in; of s, without the path through r, out.  d: gradient of a.  The pointer behind it: of
  // the values of the unit.
  template <class F>
  static FASTRNN_HD void step_backward(const F (&tape)[4], const F (&s)[2], const F (&s1)[2], const F*, F (&ds)[2],
                                       F (&d)[4], F*) {
    const F i = tape[0], f = tape[1], g = tape[2], o = tape[3], one = F(1);
    const F tc = tanh(s1[1]);
    const F dc = ds[1] + ds[0] * o * (one - tc * tc);
    d[0] = dc * g * i * (one - i);
    d[1] = dc * s[1] * f * (one - f);
    d[2] = dc * i * (one - g * g);
    d[3] = ds[0] * tc * o * (one - o);
    ds[0] = F(0);
    ds[1] = dc * f;
  }
};

}  // namespace fastrnn
