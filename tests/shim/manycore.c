/* Make a process believe in FAKE_NCPU CPUs, when preloaded with LD_PRELOAD.
 *
 * Built by tests/support_natives.py. What libraries ask: sysconf(3), get_nprocs(3), and
 * the affinity mask by sched_getaffinity(2), as a function and as a plain system call, and
 * by pthread_getaffinity_np(3). Setting a mask is left alone.
 *
 * Not covered: libraries that read CPUID, /proc/cpuinfo or /sys.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static long cpus(void)
{
    const char *text = getenv("FAKE_NCPU");
    return text ? atol(text) : 0;
}

static void *next(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

/* Fill a mask with the first n CPUs; return the bytes that the kernel would have written. */
static long fill(size_t size, void *mask, long n)
{
    size_t used = (size_t)((n + 63) / 64 * 8);
    if (size < used) {
        errno = EINVAL;
        return -1;
    }
    memset(mask, 0, used);
    for (long cpu = 0; cpu < n; cpu++)
        ((unsigned char *)mask)[cpu / 8] |= (unsigned char)(1 << (cpu % 8));
    return (long)used;
}

long sysconf(int name)
{
    long (*real)(int) = (long (*)(int))next("sysconf");
    if (cpus() && (name == _SC_NPROCESSORS_ONLN || name == _SC_NPROCESSORS_CONF))
        return cpus();
    return real(name);
}

int get_nprocs(void)
{
    return (int)(cpus() ? cpus() : ((int (*)(void))next("get_nprocs"))());
}

int get_nprocs_conf(void)
{
    return (int)(cpus() ? cpus() : ((int (*)(void))next("get_nprocs_conf"))());
}

int sched_getaffinity(pid_t pid, size_t size, cpu_set_t *mask)
{
    if (!cpus())
        return ((int (*)(pid_t, size_t, cpu_set_t *))next("sched_getaffinity"))(pid, size, mask);
    memset(mask, 0, size);
    return fill(size, mask, cpus()) < 0 ? -1 : 0;
}

int pthread_getaffinity_np(pthread_t thread, size_t size, cpu_set_t *mask)
{
    if (!cpus())
        return ((int (*)(pthread_t, size_t, cpu_set_t *))next("pthread_getaffinity_np"))(
            thread, size, mask);
    memset(mask, 0, size);
    return fill(size, mask, cpus()) < 0 ? EINVAL : 0;
}

long syscall(long number, ...)
{
    long a[6];
    va_list arguments;
    va_start(arguments, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(arguments, long);
    va_end(arguments);
    if (number == SYS_sched_getaffinity && cpus())
        return fill((size_t)a[1], (void *)a[2], cpus());
    return ((long (*)(long, ...))next("syscall"))(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
