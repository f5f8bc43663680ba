/* A scripted stand-in for libnvidia-ml.so.1, with one GPU or several of the same kind.

   FAKE_NVML_SCRIPT names a text file; without one the card idles through the defaults below. Each
   line is "TIME WORD ...", TIME in seconds since the first nvmlInit of the process (or since the
   script's epoch); empty lines and what follows a # are left out. A line holds from its TIME on,
   lines of one word stand in the order of their times.

   epoch UNIX_SECONDS           without a TIME: all times count from this moment of the wall clock,
                                so that they continue those of another process
   cards COUNT                  without a TIME: so many GPUs, of indices 0 to COUNT - 1; the last
                                digit of the UUID and the bus count on
   card INDEX LINE              any of the next lines, about this card alone; without it about all
   TIME NUMBER VALUE            a number of the card, from TIME on
   TIME NUMBER VALUE ramp       as before, but reached at TIME on a straight line from the value
                                that the line before left (or from the default, at time 0)
   TIME error CALL CODE [UNTIL] the call answers with this NVML error code (3 not supported, 13
                                function not found, 999 unknown, ...), for good or until UNTIL
   TIME lost                    the GPU is lost, and each call about it says so
   TIME hang [UNTIL]            no call answers any more, or each only at UNTIL
   TIME process PID BYTES LISTS   another process, in the LISTS compute, graphics or both

   NUMBER and its default: watts 100, counter_joules 5e6 (set to this at TIME; it rises by the exact
   integral of watts), power_limit_watts 200, default_limit_watts 215, celsius 61, slowdown_celsius
   95, fan_percent 45, sm_mhz 2475, memory_mhz 10501, max_sm_mhz 3105, utilization_percent 97,
   throttle_bits 0 (of nvml.h; 0x... is understood), pcie_generation 4, pcie_width 16,
   max_pcie_generation 4, max_pcie_width 16, total_bytes 12 GiB, used_bytes 5 GiB, self_bytes 3 GiB
   (of the calling process; -1: it is not listed, as in a container).

   CALL: init, handle, uuid, power_usage, energy, power_limit, default_limit, temperature,
   threshold, fan, sm_clock, memory_clock, max_clock, utilization, event_reasons, pcie_generation,
   pcie_width, max_pcie_generation, max_pcie_width, memory, compute, graphics, name, version,
   cuda_version.

   A script without process lines has "0 process 1 1073741824 compute". */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15, MOST = 1000 };

static const char *UUID = "GPU-12345678-1234-1234-1234-123456789abc";
static const char *BUS_ID = "00000000:01:00.0";

/* card -1: all of them */
struct point { double time, value; int ramp, card; char name[32]; };
struct fault { double time, until; int code; char call[32]; int card; }; /* call "": the GPU */
struct process { unsigned pid; unsigned long long used_bytes; unsigned parts[2]; };
struct other {
    double time;
    struct process process;
    int compute, graphics, card;
};

static struct point points[MOST];
static struct fault faults[MOST];
static struct other others[MOST];
static int point_count, fault_count, other_count;
static double hang_time = HUGE_VAL, hang_until = HUGE_VAL;
static double epoch_seconds;
static int loaded, on_wall_clock, cards = 1;
static char handles[MOST];
static _Thread_local int asked; /* the card that the call under way is about */

static void ask(void *device) { asked = (int)((char *)device - handles); }

static int is_about(int card) { return card < 0 || card == asked; }

static double clock_seconds(void) {
    struct timespec t;
    clock_gettime(on_wall_clock ? CLOCK_REALTIME : CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double now_seconds(void) { return clock_seconds() - epoch_seconds; }

static void bad_line(const char *line) {
    fprintf(stderr, "fake_nvml: cannot read the line: %s\n", line);
    exit(3);
}

static void parse(const char *line) {
    int card = -1, from = 0;
    double time = 0, until = HUGE_VAL;
    char word[32], first[32], last[256] = "";
    if (sscanf(line, "epoch %lf", &epoch_seconds) == 1) {
        on_wall_clock = 1;
        return;
    }
    if (sscanf(line, "cards %d", &cards) == 1) return;
    if (sscanf(line, "card %d %n", &card, &from) == 1) line += from;
    if (sscanf(line, "%lf %31s", &time, word) != 2 || point_count == MOST || fault_count == MOST
        || other_count == MOST)
        bad_line(line);
    if (strcmp(word, "error") == 0) {
        struct fault f = {.time = time, .card = card};
        if (sscanf(line, "%*f %*s %31s %d %lf", f.call, &f.code, &until) < 2) bad_line(line);
        f.until = until;
        faults[fault_count++] = f;
    } else if (strcmp(word, "lost") == 0) {
        faults[fault_count++] = (struct fault){time, until, GPU_IS_LOST, "", card};
    } else if (strcmp(word, "hang") == 0) {
        hang_time = time;
        sscanf(line, "%*f %*s %lf", &hang_until);
    } else if (strcmp(word, "process") == 0) {
        struct other o = {.time = time, .card = card};
        if (sscanf(line, "%*f %*s %u %llu %31s", &o.process.pid, &o.process.used_bytes, first) != 3)
            bad_line(line);
        o.compute = strcmp(first, "graphics") != 0;
        o.graphics = strcmp(first, "compute") != 0;
        others[other_count++] = o;
    } else {
        struct point p = {.time = time, .card = card};
        if (sscanf(line, "%*f %31s %31s %255s", p.name, first, last) < 2) bad_line(line);
        p.value = strtod(first, NULL);
        p.ramp = strcmp(last, "ramp") == 0;
        points[point_count++] = p;
    }
}

static void load(void) {
    const char *path = getenv("FAKE_NVML_SCRIPT");
    char line[512];
    if (loaded) return;
    loaded = 1;
    if (path) {
        FILE *file = fopen(path, "r");
        if (!file) bad_line(path);
        while (fgets(line, sizeof line, file)) {
            line[strcspn(line, "#\n")] = 0;
            if (line[strspn(line, " \t")]) parse(line);
        }
        fclose(file);
    }
    if (other_count == 0) parse("0 process 1 1073741824 compute");
    if (!on_wall_clock) epoch_seconds = clock_seconds();
}

/* The value at time t, and in *area its integral from `from` to t. */
static double value_and_area(const char *name, double otherwise, double from, double t,
                             double *area) {
    double value = otherwise, begin = 0;
    *area = 0;
    for (int i = 0; i <= point_count; i++) {
        struct point end = {.time = HUGE_VAL, .value = 0, .ramp = 0};
        if (i < point_count) {
            if (strcmp(points[i].name, name) != 0 || !is_about(points[i].card)) continue;
            end = points[i];
        }
        double slope = end.ramp && end.time > begin ? (end.value - value) / (end.time - begin) : 0;
        double low = fmax(begin, from), high = fmin(end.time, t);
        if (high > low) *area += (high - low) * (value + slope * ((low + high) / 2 - begin));
        if (t < end.time) return value + slope * (t - begin);
        value = end.value;
        begin = end.time;
    }
    return value;
}

static double number(const char *name, double otherwise) {
    double area;
    return value_and_area(name, otherwise, 0, now_seconds(), &area);
}

/* What a call answers; of_gpu: whether a GPU that is lost fails it, too. */
static int status(const char *call, int of_gpu) {
    double t = now_seconds();
    while (t >= hang_time && t < hang_until) {
        usleep(20000);
        t = now_seconds();
    }
    for (int i = 0; i < fault_count; i++) {
        struct fault f = faults[i];
        if (t < f.time || (of_gpu && !is_about(f.card))) continue;
        if (t < f.until && (f.call[0] ? strcmp(f.call, call) == 0 : of_gpu)) return f.code;
    }
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    load();
    return status("init", 0);
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) { return status("shutdown", 0); }

static int handle(int index, void **device) {
    if (index < 0 || index >= cards) return NOT_FOUND;
    asked = index;
    *device = handles + index;
    return status("handle", 1);
}

/* The card whose name is like `first`, but for the character at `place`, which counts on. */
static int index_of(const char *name, const char *first, int place) {
    char copy[64] = "";
    strncpy(copy, name, sizeof copy - 1);
    int index = copy[place] - first[place];
    copy[place] = first[place];
    return strcmp(copy, first) == 0 ? index : -1;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    return handle((int)index, device);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    return handle(index_of(uuid, UUID, 39), device);
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **device) {
    return handle(index_of(bus_id, BUS_ID, 10), device);
}

int nvmlDeviceGetUUID(void *device, char *to, unsigned size) {
    ask(device);
    strncpy(to, UUID, size);
    to[39] += asked;
    return status("uuid", 1);
}

#define TEXT(function, call, text)                                                                 \
    int function(void *device, char *to, unsigned size) {                                          \
        ask(device);                                                                               \
        strncpy(to, text, size);                                                                   \
        return status(call, 1);                                                                    \
    }

TEXT(nvmlDeviceGetName, "name", "NVIDIA GeForce RTX 4070")

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = (int)number("cuda_version", 12040);
    return status("cuda_version", 0);
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    strncpy(version, "550.54.14", size);
    return status("version", 0);
}

#define NUMBER(function, call, name, otherwise, scale)                                             \
    int function(void *device, unsigned *to) {                                                     \
        ask(device);                                                                               \
        int code = status(call, 1);                                                                \
        *to = (unsigned)lround(number(name, otherwise) * scale);                                   \
        return code;                                                                               \
    }

NUMBER(nvmlDeviceGetPowerUsage, "power_usage", "watts", 100, 1000)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, "power_limit", "power_limit_watts", 200, 1000)
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, "default_limit", "default_limit_watts", 215, 1000)
NUMBER(nvmlDeviceGetFanSpeed, "fan", "fan_percent", 45, 1)
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, "pcie_generation", "pcie_generation", 4, 1)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, "pcie_width", "pcie_width", 16, 1)
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, "max_pcie_generation", "max_pcie_generation", 4, 1)
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, "max_pcie_width", "max_pcie_width", 16, 1)

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    double joules = 5e6, since = 0, area, t;
    ask(device);
    int code = status("energy", 1);
    t = now_seconds();
    for (int i = 0; i < point_count; i++)
        if (strcmp(points[i].name, "counter_joules") == 0 && is_about(points[i].card)
            && points[i].time <= t) {
            joules = points[i].value;
            since = points[i].time;
        }
    value_and_area("watts", 100, since, t, &area);
    *millijoules = (unsigned long long)((joules + area) * 1000);
    return code;
}

int nvmlDeviceGetClockInfo(void *device, int type, unsigned *megahertz) {
    ask(device);
    int code = status(type == 1 ? "sm_clock" : "memory_clock", 1);
    *megahertz = (unsigned)lround(type == 1 ? number("sm_mhz", 2475) : number("memory_mhz", 10501));
    return code;
}

int nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned *megahertz) {
    ask(device), (void)type;
    *megahertz = (unsigned)number("max_sm_mhz", 3105);
    return status("max_clock", 1);
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    ask(device), (void)sensor;
    int code = status("temperature", 1);
    *celsius = (unsigned)lround(number("celsius", 61));
    return code;
}

int nvmlDeviceGetTemperatureThreshold(void *device, int threshold, unsigned *celsius) {
    ask(device);
    *celsius = threshold == 1 ? (unsigned)number("slowdown_celsius", 95) : 0;
    return status("threshold", 1);
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) {
    ask(device);
    int code = status("utilization", 1);
    rates[0] = (unsigned)lround(number("utilization_percent", 97));
    rates[1] = 40;
    return code;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *bits) {
    ask(device);
    int code = status("event_reasons", 1);
    *bits = (unsigned long long)number("throttle_bits", 0);
    return code;
}

int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
    ask(device);
    int code = status("memory", 1);
    memory[0] = (unsigned long long)number("total_bytes", 12ull << 30);
    memory[2] = (unsigned long long)number("used_bytes", 5ull << 30);
    memory[1] = memory[0] - memory[2];
    return code;
}

static int processes(const char *call, int graphics, unsigned *count, struct process *list) {
    double own = number("self_bytes", 3ull << 30);
    unsigned room = *count, n = 0;
    int code = status(call, 1);
    if (code != SUCCESS) return code;
    for (int i = -1; i < other_count; i++) {
        struct process p = {getpid(), (unsigned long long)own, {0, 0}};
        if (i < 0 && (own < 0 || graphics)) continue;
        if (i >= 0) {
            struct other o = others[i];
            if (now_seconds() < o.time || !is_about(o.card)) continue;
            if (!(graphics ? o.graphics : o.compute)) continue;
            p = o.process;
        }
        if (n < room) list[n] = p;
        n++;
    }
    *count = n;
    return n > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESSES(function, call, graphics)                                                        \
    int function(void *device, unsigned *count, struct process *list) {                            \
        ask(device);                                                                               \
        return processes(call, graphics, count, list);                                             \
    }

PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute", 0)
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics", 1)

/* torch's own report of an out-of-memory error asks these; the card has no NVLink. */
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, struct process *list) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, list);
}

int nvmlDeviceGetGpuFabricInfoV(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
