// SPDX-License-Identifier: Apache-2.0
// libcuda.so.1 for a machine without a driver: every call says that there is no device.
// NAMES is a generated file, STUB(name) a line.
enum { NO_DEVICE = 100 };
#define STUB(name) \
    int name(void) { return NO_DEVICE; }
#include NAMES
