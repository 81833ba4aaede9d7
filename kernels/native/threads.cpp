#include "threads.h"

int num_threads = 1;

extern "C" void set_num_threads(int count) { num_threads = count; }
