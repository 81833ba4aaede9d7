// How many threads a kernel may use. They are OpenMP's, the same that torch computes with.
#pragma once

#include "number.h"

extern int num_threads;

// Below this many elements a second thread costs more than it saves.
constexpr Index SERIAL_ELEMENTS = 16384;
