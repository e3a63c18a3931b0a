// SPDX-License-Identifier: Apache-2.0
// libnvidia-ml.so.1 that knows one H200, so that vLLM takes the machine for one with CUDA.
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, NOT_FOUND = 6 };
static const unsigned long long kMemory = 143771ULL << 20;
static const char kUuid[] = "GPU-00000000-0000-0000-0000-000000000000";
static int device;

static int text(char *out, unsigned length, const char *value) {
    snprintf(out, length, "%s", value);
    return SUCCESS;
}

int nvmlInit(void) { return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int error) { return "not found by the stub"; }
int nvmlSystemGetDriverVersion(char *out, unsigned length) { return text(out, length, "580.159.04"); }
int nvmlSystemGetNVMLVersion(char *out, unsigned length) { return text(out, length, "13.580"); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = 13000, SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { return *count = 1, SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    *out = &device;
    return index ? NOT_FOUND : SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    *out = &device;
    return strcmp(uuid, kUuid) ? NOT_FOUND : SUCCESS;
}
int nvmlDeviceGetIndex(void *of, unsigned *index) { return *index = 0, SUCCESS; }
int nvmlDeviceGetName(void *of, char *out, unsigned length) { return text(out, length, "NVIDIA H200"); }
int nvmlDeviceGetUUID(void *of, char *out, unsigned length) { return text(out, length, kUuid); }
int nvmlDeviceGetCudaComputeCapability(void *of, int *major, int *minor) {
    return *major = 9, *minor = 0, SUCCESS;
}
int nvmlDeviceGetMemoryInfo(void *of, unsigned long long *total_free_used) {
    total_free_used[0] = total_free_used[1] = kMemory;
    return total_free_used[2] = 0, SUCCESS;
}
int nvmlDeviceGetP2PStatus(void *a, void *b, int what, int *status) { return *status = 0, SUCCESS; }
