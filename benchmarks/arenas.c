/* Arenas of Python's own allocator in huge pages: importing this module is all it takes.
 *
 * A simulated swarm of hundreds is gigabytes of small objects, visited in no order. Python asks the
 * system for 1 MiB at a time, which can never become huge pages; here it gets pieces of larger
 * blocks that can. Nothing is given back: arenas that Python lets go of are handed out again. A
 * process that has imported this must end with os._exit, before Python frees its first arenas,
 * which were not made here.
 */
#include <Python.h>
#include <stdint.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)
#define BLOCK ((size_t)64 << 20)
#define FREE_MAX 65536

static char *next_arena, *block_end;
static size_t arena_bytes;
static void *free_arenas[FREE_MAX];
static int free_count;

static void *
take(void *unused, size_t nbytes)
{
    (void)unused;
    if (arena_bytes == 0) {
        arena_bytes = nbytes;
    }
    if (nbytes != arena_bytes || nbytes > BLOCK) {
        return NULL;
    }
    if (free_count > 0) {
        return free_arenas[--free_count];
    }
    if ((size_t)(block_end - next_arena) < nbytes) {
        char *mapped = mmap(NULL, BLOCK + HUGE_PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) {
            return NULL;
        }
        uintptr_t aligned = ((uintptr_t)mapped + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1);
        next_arena = (char *)aligned;
        block_end = next_arena + BLOCK;
        madvise(next_arena, BLOCK, MADV_HUGEPAGE);
    }
    void *arena = next_arena;
    next_arena += nbytes;
    return arena;
}

static void
give_back(void *unused, void *arena, size_t nbytes)
{
    (void)unused;
    if (nbytes == arena_bytes && free_count < FREE_MAX) {
        free_arenas[free_count++] = arena;
    }
}

static PyObjectArenaAllocator allocator = {NULL, take, give_back};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "arenas", NULL, -1, NULL};

PyMODINIT_FUNC
PyInit_arenas(void)
{
    PyObject_SetArenaAllocator(&allocator);
    return PyModule_Create(&module);
}
