// Divisions by numbers that a kernel's launch knows.
#pragma once

#include <cstdint>

#include "dsv4/formats.h"

namespace dsv4 {

// Divides numbers from 0 to 2^31 - 1 by a multiplication; by 0 they give 0.
struct Divisor {
  int value;
  uint32_t factor;
  int shift;

  Divisor() = default;
  DSV4_HOST_DEVICE Divisor(int divisor) : value(divisor), factor(0), shift(31) {
    while ((int64_t{1} << (shift - 31)) < divisor) ++shift;
    if (divisor > 0) factor = static_cast<uint32_t>(((uint64_t{1} << shift) - 1) / divisor + 1);
  }

  DSV4_HOST_DEVICE operator int() const { return value; }

  friend DSV4_HOST_DEVICE int operator/(int x, const Divisor& by) {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(x)} * by.factor >> by.shift);
  }
  friend DSV4_HOST_DEVICE int operator%(int x, const Divisor& by) { return x - x / by * by.value; }
};

}  // namespace dsv4
