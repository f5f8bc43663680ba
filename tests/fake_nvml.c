/* A scripted stand-in for libnvidia-ml.so.1, for the one GPU of index 0.

   FAKE_NVML_WATTS               power at the start, in W (100)
   FAKE_NVML_WATTS_PER_SECOND    its rise, in W/s (0)
   FAKE_NVML_UNSUPPORTED         names of numbers that are not supported, e.g. "energy,temperature"
   FAKE_NVML_LOST_AFTER_CALLS    after so many readings of power the GPU is lost
   FAKE_NVML_HANGS_AFTER_CALLS   after so many readings of power the driver answers no more
   FAKE_NVML_HIDES_PROCESS       the calling process is not listed, as in a container
   FAKE_NVML_CUDA                the newest CUDA of the driver, as NVML numbers it (12040)
   FAKE_NVML_ENERGY_LOST_AFTER_CALLS   after so many readings of power the counter is not supported
*/
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

static const char *UUID = "GPU-12345678-1234-1234-1234-123456789abc";
static const char *BUS_ID = "00000000:01:00.0";
static double started_seconds;
static long power_calls;

static double number(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text ? atof(text) : otherwise;
}

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double elapsed_seconds(void) { return now_seconds() - started_seconds; }

static int lost(void) { return power_calls > number("FAKE_NVML_LOST_AFTER_CALLS", 1e18); }

static int status(const char *what) {
    const char *unsupported = getenv("FAKE_NVML_UNSUPPORTED");
    if (lost()) return GPU_IS_LOST;
    return unsupported && strstr(unsupported, what) ? NOT_SUPPORTED : SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (started_seconds == 0) started_seconds = now_seconds();
    return SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = &started_seconds;
    return index == 0 ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = &started_seconds;
    return strcmp(uuid, UUID) == 0 ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **device) {
    *device = &started_seconds;
    return strcmp(bus_id, BUS_ID) == 0 ? SUCCESS : NOT_FOUND;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = number("FAKE_NVML_CUDA", 12040);
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementDefaultLimit(void *device, unsigned *milliwatts) {
    (void)device;
    *milliwatts = 215000;
    return status("default_limit");
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    (void)device;
    power_calls++;
    while (power_calls > number("FAKE_NVML_HANGS_AFTER_CALLS", 1e18)) sleep(1);
    *milliwatts = 1000 * (number("FAKE_NVML_WATTS", 100)
                          + number("FAKE_NVML_WATTS_PER_SECOND", 0) * elapsed_seconds());
    return status("power_usage");
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    double t = elapsed_seconds();
    (void)device;
    /* A counter counts since the driver was loaded, not since the run began. */
    *millijoules = 1000 * (5e6 + number("FAKE_NVML_WATTS", 100) * t
                           + number("FAKE_NVML_WATTS_PER_SECOND", 0) * t * t / 2);
    if (power_calls > number("FAKE_NVML_ENERGY_LOST_AFTER_CALLS", 1e18)) return NOT_SUPPORTED;
    return status("energy");
}

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) {
    (void)device;
    *milliwatts = 200000;
    return status("power_limit");
}

int nvmlDeviceGetClockInfo(void *device, int type, unsigned *megahertz) {
    (void)device;
    *megahertz = type == 1 ? 2475 : 9000;
    return status("sm_clock");
}

int nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned *megahertz) {
    (void)device;
    *megahertz = type == 1 ? 3105 : 9000;
    return status("max_clock");
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    (void)device, (void)sensor;
    *celsius = 61;
    return status("temperature");
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) {
    (void)device;
    rates[0] = 97;
    rates[1] = 40;
    return status("utilization");
}

int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
    (void)device;
    memory[0] = 12ull << 30;
    memory[1] = 7ull << 30;
    memory[2] = 5ull << 30;
    return status("memory");
}

struct process {
    unsigned pid;
    unsigned long long used_bytes;
    unsigned gpu_instance, compute_instance;
};

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, struct process *list) {
    unsigned room = *count;
    (void)device;
    if (status("processes") != SUCCESS) return status("processes");
    *count = 2;
    if (room < 2) return INSUFFICIENT_SIZE;
    list[0] = (struct process){1, 1ull << 30, 0, 0};
    list[1] = (struct process){getenv("FAKE_NVML_HIDES_PROCESS") ? 2 : getpid(), 3ull << 30, 0, 0};
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned size) {
    (void)device;
    strncpy(name, "NVIDIA GeForce RTX 4070", size);
    return status("name");
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    strncpy(version, "550.54.14", size);
    return status("version");
}
