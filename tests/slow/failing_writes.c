/* Stands before the C library and lets one of the writes into a folder fail, or several in a row.

Loaded with LD_PRELOAD; off until fail_writes is called. What is counted: making, opening for
writing, writing, flushing, cutting and renaming of files below the folder, and making folders. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t length;
static atomic_long seen;
static long first, last;
static int error;

/* From the first-th to the last-th write below this folder, counted from 1, errno is `number`. */
void fail_writes(const char *below, long from, long to, int number) {
    strncpy(folder, below, sizeof folder - 1);
    first = from, last = to, error = number;
    atomic_store(&seen, 0);
    length = strlen(folder);
}

long writes_seen(void) { return atomic_load(&seen); }

static int below(const char *path) {
    return length && path[0] == '/' && strncmp(path, folder, length) == 0;
}

/* Whether this write is to fail. What has a name, EACCES may refuse; an open file has other errors.
 */
static int fails(int counted, int named) {
    if (!counted) return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (number < first || number > last) return 0;
    errno = error == EACCES && !named ? EIO : error;
    return 1;
}

static int file_fails(int file) {
    char link[64], path[PATH_MAX];
    if (!length) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t read = readlink(link, path, sizeof path - 1);
    errno = before;
    if (read < 0) return 0;
    path[read] = 0;
    return fails(below(path), 0);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
    return file_fails(file) ? -1 : REAL(write)(file, data, size);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return file_fails(file) ? -1 : REAL(writev)(file, parts, count);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return file_fails(file) ? -1 : REAL(pwrite)(file, data, size, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return file_fails(file) ? -1 : REAL(pwrite64)(file, data, size, at);
}
int fsync(int file) { return file_fails(file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return file_fails(file) ? -1 : REAL(fdatasync)(file); }
int ftruncate(int file, off_t size) { return file_fails(file) ? -1 : REAL(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) {
    return file_fails(file) ? -1 : REAL(ftruncate64)(file, size);
}
int mkdir(const char *path, mode_t mode) {
    return fails(below(path), 1) ? -1 : REAL(mkdir)(path, mode);
}
int rename(const char *from, const char *to) {
    return fails(below(to), 1) ? -1 : REAL(rename)(from, to);
}
int renameat(int folder_from, const char *from, int folder_to, const char *to) {
    return fails(below(to), 1) ? -1 : REAL(renameat)(folder_from, from, folder_to, to);
}

#define OPENING(name, parameters, ...)                              \
    int name parameters {                                           \
        mode_t mode = 0;                                            \
        if (flags & O_CREAT) {                                      \
            va_list more;                                           \
            va_start(more, flags);                                  \
            mode = va_arg(more, mode_t);                            \
            va_end(more);                                           \
        }                                                           \
        int writes = (flags & O_ACCMODE) != O_RDONLY;               \
        if (fails(writes && below(path), 1)) return -1;             \
        return REAL(name)(__VA_ARGS__, mode);                       \
    }
OPENING(open, (const char *path, int flags, ...), path, flags)
OPENING(open64, (const char *path, int flags, ...), path, flags)
OPENING(openat, (int at, const char *path, int flags, ...), at, path, flags)
OPENING(openat64, (int at, const char *path, int flags, ...), at, path, flags)
