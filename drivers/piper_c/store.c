/* FrameStore: the newest of every frame that one arm sends by itself. */

#include "core.h"

#define ID_STATUS 0x2A1
#define ID_JOINT_FEEDBACK 0x2A5 /* to 0x2A7 */
#define ID_GRIPPER_FEEDBACK 0x2A8
#define ID_MOTOR_FAST 0x251 /* to 0x256 */
#define ID_MOTOR_SLOW 0x261 /* to 0x266 */

/* The three joint frames leave the arm back to back (0.4 ms at 1 Mbit/s) every 5 ms: frames of one
 * moment are closer than this window, frames of neighbouring moments are not. */
#define POSE_WINDOW_NS 3000000
#define WILD_MDEG 360000
#define WILD_UM 150000

static int
slot_of(uint32_t can_id)
{
    if (can_id >= ID_JOINT_FEEDBACK && can_id < ID_JOINT_FEEDBACK + 3)
        return SLOT_JOINTS + (int)(can_id - ID_JOINT_FEEDBACK);
    if (can_id >= ID_MOTOR_FAST && can_id < ID_MOTOR_FAST + N_JOINTS)
        return SLOT_FAST + (int)(can_id - ID_MOTOR_FAST);
    if (can_id >= ID_MOTOR_SLOW && can_id < ID_MOTOR_SLOW + N_JOINTS)
        return SLOT_SLOW + (int)(can_id - ID_MOTOR_SLOW);
    if (can_id == ID_STATUS)
        return SLOT_STATUS;
    if (can_id == ID_GRIPPER_FEEDBACK)
        return SLOT_GRIPPER;
    return -1;
}

/* Make a pose of the three joint frames if they are of one moment. */
static void
store_take_pose(FrameStore *self)
{
    const int64_t *t_ns = self->t_ns + SLOT_JOINTS;
    int64_t oldest = t_ns[0], newest = t_ns[0];
    for (int i = 1; i < 3; i++) {
        if (t_ns[i] < oldest)
            oldest = t_ns[i];
        if (t_ns[i] > newest)
            newest = t_ns[i];
    }
    if ((uint64_t)newest - (uint64_t)oldest > POSE_WINDOW_NS)
        return;
    self->parts_new = 0;
    int32_t joint_mdeg[N_JOINTS];
    for (int j = 0; j < N_JOINTS; j++) {
        joint_mdeg[j] = get_i32(self->data[SLOT_JOINTS + j / 2] + 4 * (j % 2));
        if (joint_mdeg[j] < -WILD_MDEG || joint_mdeg[j] > WILD_MDEG) {
            self->n_bad++;
            return;
        }
    }
    memcpy(self->joint_mdeg, joint_mdeg, sizeof joint_mdeg);
    self->t_pose_ns = oldest;
    self->n_poses++;
    self->has_pose = true;
}

bool
store_take(FrameStore *self, uint32_t can_id, const uint8_t *data, size_t length, int64_t t_ns)
{
    self->n_frames++;
    if (length != DATA_BYTES) {
        self->n_bad++;
        return false;
    }
    int slot = slot_of(can_id);
    if (slot < 0)
        return true;
    uint8_t *last = self->data[slot];
    bool is_news = false;
    if (slot == SLOT_GRIPPER) {
        int32_t gripper_um = get_i32(data);
        if (gripper_um < -WILD_UM || gripper_um > WILD_UM) {
            self->n_bad++;
            return false;
        }
        self->gripper_um = gripper_um;
        self->has_gripper = true;
        is_news = data[6] != last[6]; /* status bits */
    }
    else if (slot == SLOT_STATUS)
        is_news = memcmp(data, last, DATA_BYTES) != 0;
    else if (slot >= SLOT_SLOW && slot < SLOT_FAST)
        is_news = data[5] != last[5]; /* status bits */
    memcpy(last, data, DATA_BYTES);
    self->t_ns[slot] = t_ns;
    self->heard[slot] = true;
    if (slot < SLOT_JOINTS + 3) {
        self->parts_new |= 1u << (slot - SLOT_JOINTS);
        if (self->parts_new == 7)
            store_take_pose(self);
        return false;
    }
    if (slot >= SLOT_FAST)
        return false;
    is_news = is_news || !self->judged[slot];
    self->judged[slot] = true;
    return is_news;
}

int64_t
store_oldest_ns(const FrameStore *self, int n_slots)
{
    int64_t oldest_ns = self->t_pose_ns;
    for (int slot = SLOT_STATUS; slot < n_slots; slot++)
        oldest_ns = least(oldest_ns, self->t_ns[slot]);
    return oldest_ns;
}

int
append_frame(PyObject **list, uint32_t can_id, const uint8_t *data, size_t length, int64_t t_ns)
{
    if (*list == NULL && (*list = PyList_New(0)) == NULL)
        return -1;
    PyObject *frame = Py_BuildValue("(Iy#L)", (unsigned)can_id, (const char *)data,
                                    (Py_ssize_t)length, (long long)t_ns);
    if (frame == NULL)
        return -1;
    int result = PyList_Append(*list, frame);
    Py_DECREF(frame);
    return result;
}

PyObject *
list_or_none(PyObject *list)
{
    if (list != NULL)
        return list;
    Py_RETURN_NONE;
}

static PyObject *
store_clear(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    memset((char *)op + offsetof(FrameStore, t_ns), 0,
           sizeof(FrameStore) - offsetof(FrameStore, t_ns));
    Py_RETURN_NONE;
}

void
store_forget_judged(FrameStore *self)
{
    memset(self->judged, 0, sizeof self->judged);
}

static PyObject *
store_forget_judged_method(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    store_forget_judged((FrameStore *)op);
    Py_RETURN_NONE;
}

int
read_can_id(PyObject *object, void *can_id)
{
    unsigned long value = PyLong_AsUnsignedLong(object);
    if (PyErr_Occurred())
        return 0;
    if (value > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "an identifier has 32 bits at most");
        return 0;
    }
    *(uint32_t *)can_id = (uint32_t)value;
    return 1;
}

static PyObject *
store_take_frames(PyObject *op, PyObject *frames)
{
    PyObject *iterator = PyObject_GetIter(frames);
    if (iterator == NULL)
        return NULL;
    PyObject *news = NULL, *item;
    while ((item = PyIter_Next(iterator)) != NULL) {
        uint32_t can_id;
        char *data;
        Py_ssize_t length;
        long long t_ns;
        int ok = -1;
        if (PyTuple_Check(item)
            && PyArg_ParseTuple(item, "O&y#L", read_can_id, &can_id, &data, &length, &t_ns)) {
            ok = 0;
            if (store_take((FrameStore *)op, can_id, (uint8_t *)data, (size_t)length, t_ns))
                ok = append_frame(&news, can_id, (uint8_t *)data, (size_t)length, t_ns);
        }
        else if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "a frame is a tuple (identifier, data, time)");
        Py_DECREF(item);
        if (ok < 0)
            break;
    }
    Py_DECREF(iterator);
    if (PyErr_Occurred()) {
        store_forget_judged((FrameStore *)op); /* the news are lost: what they said is told again */
        Py_XDECREF(news);
        return NULL;
    }
    return list_or_none(news);
}

static PyObject *
store_data(PyObject *op, PyObject *argument)
{
    FrameStore *self = (FrameStore *)op;
    unsigned long can_id = PyLong_AsUnsignedLong(argument);
    if (can_id == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    int slot = slot_of((uint32_t)can_id);
    if (slot < 0 || !self->heard[slot])
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((char *)self->data[slot], DATA_BYTES);
}

static PyObject *
store_t_ns(PyObject *op, PyObject *argument)
{
    FrameStore *self = (FrameStore *)op;
    unsigned long can_id = PyLong_AsUnsignedLong(argument);
    if (can_id == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    int slot = slot_of((uint32_t)can_id);
    return PyLong_FromLongLong(slot < 0 ? 0 : self->t_ns[slot]);
}

static PyObject *
store_get_joint_mdeg(PyObject *op, void *Py_UNUSED(closure))
{
    const int32_t *q = ((FrameStore *)op)->joint_mdeg;
    return Py_BuildValue("[iiiiii]", q[0], q[1], q[2], q[3], q[4], q[5]);
}

static PyObject *
store_get_gripper_um(PyObject *op, void *Py_UNUSED(closure))
{
    FrameStore *self = (FrameStore *)op;
    if (!self->has_gripper)
        Py_RETURN_NONE;
    return PyLong_FromLong(self->gripper_um);
}

static PyObject *
store_get_t_oldest_ns(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(store_oldest_ns((FrameStore *)op, SLOT_FAST));
}

void
plain_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(op);
    Py_DECREF(type);
}

static PyMethodDef store_methods[] = {
    {"clear", store_clear, METH_NOARGS, NULL},
    {"forget_judged", store_forget_judged_method, METH_NOARGS, NULL},
    {"take_frames", store_take_frames, METH_O, NULL},
    {"data_of", store_data, METH_O, NULL},
    {"t_ns_of", store_t_ns, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef store_members[] = {
    {"t_pose_ns", T_LONGLONG, offsetof(FrameStore, t_pose_ns), READONLY, NULL},
    {"n_poses", T_LONGLONG, offsetof(FrameStore, n_poses), READONLY, NULL},
    {"n_frames", T_LONGLONG, offsetof(FrameStore, n_frames), READONLY, NULL},
    {"n_bad", T_LONGLONG, offsetof(FrameStore, n_bad), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef store_getset[] = {
    {"joint_mdeg", store_get_joint_mdeg, NULL, NULL, NULL},
    {"gripper_um", store_get_gripper_um, NULL, NULL, NULL},
    {"t_oldest_ns", store_get_t_oldest_ns, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot store_slots[] = {
    {Py_tp_dealloc, plain_dealloc},
    {Py_tp_methods, store_methods},
    {Py_tp_members, store_members},
    {Py_tp_getset, store_getset},
    {0, NULL},
};

static PyType_Spec store_spec = {
    .name = "gwp_edge.drivers.piper_native.FrameStore",
    .basicsize = sizeof(FrameStore),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = store_slots,
};

static PyTypeObject *store_type;

PyObject *
make_store_type(void)
{
    store_type = (PyTypeObject *)PyType_FromSpec(&store_spec);
    return (PyObject *)store_type;
}

bool
is_store(PyObject *object)
{
    return PyObject_TypeCheck(object, store_type);
}
