/* Make writes below a folder fail, for LD_PRELOAD. Off until fail_writes is called. */
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
static long first, last, error;

/* Fail the writes below this folder from the first to the last, counted from 1, with this errno. */
void fail_writes(const char *below, long from, long to, long number) {
    strncpy(folder, below, sizeof folder - 1);
    first = from, last = to, error = number;
    atomic_store(&seen, 0);
    length = strlen(folder);
}

long writes_seen(void) { return atomic_load(&seen); }

/* EACCES is an error of names; for an open file it becomes EIO. */
static int fails(const char *path, int named) {
    if (!length || path[0] != '/' || strncmp(path, folder, length)) return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (number < first || number > last) return 0;
    errno = error == EACCES && !named ? EIO : error;
    return 1;
}

static int file_fails(int file) {
    char link[64], path[PATH_MAX] = "";
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (length && readlink(link, path, sizeof path - 1) < 0) path[0] = 0;
    errno = before;
    return fails(path, 0);
}

#define WRAP(type, name, parameters, failed, ...)                                       \
    type name parameters {                                                              \
        if (failed) return -1;                                                          \
        return ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__);               \
    }
WRAP(ssize_t, write, (int f, const void *d, size_t n), file_fails(f), f, d, n)
WRAP(ssize_t, writev, (int f, const struct iovec *p, int n), file_fails(f), f, p, n)
WRAP(ssize_t, pwrite, (int f, const void *d, size_t n, off_t at), file_fails(f), f, d, n, at)
WRAP(ssize_t, pwrite64, (int f, const void *d, size_t n, off64_t at), file_fails(f), f, d, n, at)
WRAP(int, fsync, (int f), file_fails(f), f)
WRAP(int, fdatasync, (int f), file_fails(f), f)
WRAP(int, ftruncate, (int f, off_t n), file_fails(f), f, n)
WRAP(int, ftruncate64, (int f, off64_t n), file_fails(f), f, n)
WRAP(int, mkdir, (const char *path, mode_t mode), fails(path, 1), path, mode)
WRAP(int, rename, (const char *from, const char *to), fails(to, 1), from, to)
WRAP(int, renameat, (int a, const char *from, int b, const char *to), fails(to, 1), a, from, b, to)

#define OPENING(name, parameters, ...)                                                  \
    int name parameters {                                                               \
        va_list more;                                                                   \
        va_start(more, flags);                                                          \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                       \
        va_end(more);                                                                   \
        if ((flags & O_ACCMODE) != O_RDONLY && fails(path, 1)) return -1;               \
        return ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__, mode);         \
    }
OPENING(open, (const char *path, int flags, ...), path, flags)
OPENING(open64, (const char *path, int flags, ...), path, flags)
OPENING(openat, (int at, const char *path, int flags, ...), at, path, flags)
OPENING(openat64, (int at, const char *path, int flags, ...), at, path, flags)
