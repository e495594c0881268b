/* Make a process believe in FAKE_NCPU CPUs, when preloaded with LD_PRELOAD.
 *
 * Built by pretend.py. What libraries ask: sysconf(3), get_nprocs(3), and
 * the affinity mask by sched_getaffinity(2), as a function and as a plain system call, and
 * by pthread_getaffinity_np(3). A mask that is set by sched_setaffinity(2) for the first thread
 * is remembered, and answered from then on; the kernel is told nothing of it.
 *
 * Not covered: libraries that read CPUID, /proc/cpuinfo or /sys; masks of other threads; a mask
 * after exec.
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

enum { MOST = 1024 };
static unsigned char chosen[MOST / 8];
static int bound;

/* Remember the part of a mask that there is; fail as the kernel does if that is nothing. */
static int choose(pid_t pid, size_t size, const void *mask)
{
    unsigned char found[sizeof chosen] = {0};
    int any = 0;
    if (mask == NULL) { /* Intel's OpenMP asks with it whether there is such a call */
        errno = EFAULT;
        return -1;
    }
    for (long cpu = 0; cpu < cpus() && cpu < MOST && (size_t)cpu / 8 < size; cpu++)
        if (((const unsigned char *)mask)[cpu / 8] & (1 << (cpu % 8))) {
            found[cpu / 8] |= (unsigned char)(1 << (cpu % 8));
            any = 1;
        }
    if (!any) {
        errno = EINVAL;
        return -1;
    }
    if (pid == getpid() || (pid == 0 && gettid() == getpid())) {
        memcpy(chosen, found, sizeof chosen);
        bound = 1;
    }
    return 0;
}

/* Fill a mask with the first n CPUs, or with those that were chosen of them; return the bytes that the kernel would have written. */
static long fill(size_t size, void *mask, long n)
{
    size_t used = (size_t)((n + 63) / 64 * 8);
    if (size < used) {
        errno = EINVAL;
        return -1;
    }
    memset(mask, 0, used);
    for (long cpu = 0; cpu < n; cpu++)
        if (!bound || chosen[cpu / 8] & (1 << (cpu % 8)))
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

int sched_setaffinity(pid_t pid, size_t size, const cpu_set_t *mask)
{
    if (!cpus())
        return ((int (*)(pid_t, size_t, const cpu_set_t *))next("sched_setaffinity"))(
            pid, size, mask);
    return choose(pid, size, mask);
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
    if (number == SYS_sched_setaffinity && cpus())
        return choose((pid_t)a[0], (size_t)a[1], (const void *)a[2]);
    return ((long (*)(long, ...))next("syscall"))(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
