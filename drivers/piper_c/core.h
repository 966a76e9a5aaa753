/* The part of the PiPER driver that every tick repeats for every frame: many packets per system
 * call, the newest of each frame that comes by itself, numbers to frames and back.
 *
 * Nothing here judges: piper_feedback.py decides what a frame means for the motion, and is given
 * every frame that may say something new. In Python this part costs twice as much, most of it for
 * code and objects that have left the caches since the last tick.
 *
 * The interpreter's lock is kept, as no call here blocks. Only the stable ABI of Python 3.10 is
 * used, so one build serves every later Python.
 *
 * Sources: linux/can.h (struct can_frame), recvmmsg(2), socket(7); the PiPER protocol as
 * piper_codec.py describes it. piper_native.pyi documents what Python sees.
 */

#ifndef GWP_PIPER_CORE_H
#define GWP_PIPER_CORE_H

#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <structmember.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define N_JOINTS 6
#define N_CHANNELS (N_JOINTS + 1)
#define DATA_BYTES 8

#define CAN_ERR_FLAG 0x20000000u
#define N_STANDARD_IDS 0x800u

/* One slot for each frame that comes by itself; those from SLOT_FAST on have no silence of their
 * own to name. */
enum {
    SLOT_JOINTS = 0,
    SLOT_STATUS = 3,
    SLOT_GRIPPER = 4,
    SLOT_SLOW = 5,
    SLOT_FAST = 11,
    N_SLOTS = 17,
};

/* What piper_core.py expects; to be changed in both with what they mean to each other. */
#define CORE_API 1

typedef struct {
    PyObject_HEAD
    int64_t t_ns[N_SLOTS]; /* 0: never */
    uint8_t data[N_SLOTS][DATA_BYTES];
    bool heard[N_SLOTS];
    bool judged[N_SLOTS]; /* what it says has been returned as news */
    unsigned parts_new;   /* a bit for each joint frame that came since the last pose */
    bool has_pose, has_gripper;
    int32_t joint_mdeg[N_JOINTS];
    int32_t gripper_um;
    long long t_pose_ns, n_poses, n_frames, n_bad;
} FrameStore;

/* Make the types; NULL with an exception set if that fails. */
PyObject *make_store_type(void);
PyObject *make_port_type(void);

bool is_store(PyObject *object);

/* Take one frame; return whether it may say something that has to be judged. */
bool store_take(FrameStore *self, uint32_t can_id, const uint8_t *data, size_t length,
                int64_t t_ns);

/* Return the next frame of each kind as news, even if it says nothing new. */
void store_forget_judged(FrameStore *self);

/* Set *can_id to an int that fits 32 bits; 0 with an exception set if it is none (a "O&"). */
int read_can_id(PyObject *object, void *can_id);

/* Append (can_id, data, t_ns) to *list, which is made when it is NULL; -1 if that fails. */
int append_frame(PyObject **list, uint32_t can_id, const uint8_t *data, size_t length,
                 int64_t t_ns);

/* Return the list, or None in place of NULL. */
PyObject *list_or_none(PyObject *list);

/* Return the stamp of what has not been heard for longest: the pose and the slots below n_slots. */
int64_t store_oldest_ns(const FrameStore *self, int n_slots);

/* tp_dealloc of both types. */
void plain_dealloc(PyObject *op);

static inline int64_t
least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int32_t
get_i32(const uint8_t *p)
{
    return (int32_t)((uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]);
}

static inline int16_t
get_i16(const uint8_t *p)
{
    return (int16_t)((uint16_t)(p[0] << 8) | p[1]);
}

#endif
