/* The module, and what is done for all arms of a robot in one call. */

#include "core.h"

#include <math.h>

#define MAX_ARMS 8
#define ID_JOINT_TARGETS 0x155 /* to 0x157 */
#define ID_GRIPPER 0x159
#define GRIPPER_ENABLE 1
#define GRIPPER_EFFORT_CAP_MNM 2000

static const double RAD_PER_MDEG = 3.14159265358979323846 / 180000.0;
static const double MDEG_PER_RAD = 180000.0 / 3.14159265358979323846;
static const double M_PER_UM = 1e-6, UM_PER_M = 1e6;

static void
put_i32(uint8_t *p, int32_t value)
{
    uint32_t bits = (uint32_t)value;
    p[0] = (uint8_t)(bits >> 24);
    p[1] = (uint8_t)(bits >> 16);
    p[2] = (uint8_t)(bits >> 8);
    p[3] = (uint8_t)bits;
}

static PyObject *
read_arms(PyObject *Py_UNUSED(module), PyObject *stores)
{
    double position[MAX_ARMS][N_CHANNELS], velocity[MAX_ARMS][N_CHANNELS];
    int64_t t_position_ns = INT64_MAX, t_oldest_ns = INT64_MAX;
    if (!PyTuple_Check(stores) || PyTuple_Size(stores) > MAX_ARMS) {
        PyErr_Format(PyExc_TypeError, "read_arms takes a tuple of at most %d stores", MAX_ARMS);
        return NULL;
    }
    Py_ssize_t n_arms = PyTuple_Size(stores);
    for (Py_ssize_t arm = 0; arm < n_arms; arm++) {
        PyObject *item = PyTuple_GetItem(stores, arm);
        if (!is_store(item)) {
            PyErr_SetString(PyExc_TypeError, "read_arms takes FrameStores");
            return NULL;
        }
        FrameStore *store = (FrameStore *)item;
        if (!store->has_pose || !store->has_gripper)
            Py_RETURN_NONE;
        for (int j = 0; j < N_JOINTS; j++) {
            int slot = SLOT_FAST + j;
            position[arm][j] = store->joint_mdeg[j] * RAD_PER_MDEG;
            velocity[arm][j] = store->heard[slot] ? get_i16(store->data[slot]) * 1e-3 : (double)NAN;
        }
        position[arm][N_JOINTS] = store->gripper_um * M_PER_UM;
        velocity[arm][N_JOINTS] = (double)NAN;
        t_position_ns = least(t_position_ns, store->t_pose_ns);
        t_position_ns = least(t_position_ns, store->t_ns[SLOT_GRIPPER]);
        t_oldest_ns = least(t_oldest_ns, store_oldest_ns(store, N_SLOTS));
    }
    Py_ssize_t n_bytes = n_arms * (Py_ssize_t)sizeof position[0];
    return Py_BuildValue("(y#y#LL)", (char *)position, n_bytes, (char *)velocity, n_bytes,
                         (long long)t_position_ns, (long long)t_oldest_ns);
}

static PyObject *
encode_arms(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t n_arguments)
{
    double ranges[MAX_ARMS][N_CHANNELS][2];
    uint8_t data[MAX_ARMS][4][DATA_BYTES];
    if (n_arguments != 3 || !PyList_Check(arguments[0]) || !PyBytes_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "encode_arms takes a list, bytes and a whole number");
        return NULL;
    }
    Py_ssize_t n_bytes = PyBytes_Size(arguments[1]);
    Py_ssize_t n_arms = n_bytes / (Py_ssize_t)sizeof ranges[0];
    if (n_arms > MAX_ARMS || n_bytes != n_arms * (Py_ssize_t)sizeof ranges[0]
        || PyList_Size(arguments[0]) != n_arms * N_CHANNELS) {
        PyErr_Format(PyExc_ValueError, "encode_arms takes as many targets as ranges, got %zd and "
                     "%zd bytes of ranges", PyList_Size(arguments[0]), n_bytes);
        return NULL;
    }
    memcpy(ranges, PyBytes_AsString(arguments[1]), (size_t)n_bytes);
    long effort_mnm = PyLong_AsLong(arguments[2]);
    if (effort_mnm == -1 && PyErr_Occurred())
        return NULL;
    if (effort_mnm < 0 || effort_mnm > GRIPPER_EFFORT_CAP_MNM) {
        PyErr_Format(PyExc_ValueError, "gripper effort: expected 0 to %d, got %ld",
                     GRIPPER_EFFORT_CAP_MNM, effort_mnm);
        return NULL;
    }
    for (Py_ssize_t arm = 0; arm < n_arms; arm++) {
        for (int i = 0; i < N_CHANNELS; i++) {
            double value = PyFloat_AsDouble(PyList_GetItem(arguments[0], arm * N_CHANNELS + i));
            if (value == -1.0 && PyErr_Occurred())
                return NULL;
            /* Written so that NaN is refused. rint rounds ties to even, so symmetrically. */
            double scaled = rint(value * (i < N_JOINTS ? MDEG_PER_RAD : UM_PER_M));
            if (!(value >= ranges[arm][i][0] && value <= ranges[arm][i][1])
                || !(scaled >= INT32_MIN && scaled <= INT32_MAX))
                Py_RETURN_NONE;
            put_i32(data[arm][i / 2] + 4 * (i % 2), (int32_t)scaled);
        }
        uint8_t *rest = data[arm][3] + 4;
        rest[0] = (uint8_t)(effort_mnm >> 8);
        rest[1] = (uint8_t)effort_mnm;
        rest[2] = GRIPPER_ENABLE;
        rest[3] = 0; /* no new zero */
    }
    PyObject *commands = PyTuple_New(n_arms);
    for (Py_ssize_t arm = 0; commands != NULL && arm < n_arms; arm++) {
        const Py_ssize_t n = DATA_BYTES;
        PyObject *command = Py_BuildValue(
            "((Iy#)(Iy#)(Iy#)(Iy#))", ID_JOINT_TARGETS, data[arm][0], n, ID_JOINT_TARGETS + 1,
            data[arm][1], n, ID_JOINT_TARGETS + 2, data[arm][2], n, ID_GRIPPER, data[arm][3], n);
        if (command == NULL || PyTuple_SetItem(commands, arm, command) < 0)
            Py_CLEAR(commands);
    }
    return commands;
}

static PyMethodDef module_methods[] = {
    {"read_arms", read_arms, METH_O, NULL},
    {"encode_arms", (PyCFunction)(void (*)(void))encode_arms, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gwp_edge.drivers.piper_native",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC
PyInit_piper_native(void)
{
    PyObject *self = PyModule_Create(&module);
    if (self == NULL)
        return NULL;
    PyObject *store = make_store_type(), *port = make_port_type();
    if (store == NULL || port == NULL || PyModule_AddObject(self, "FrameStore", store) < 0
        || PyModule_AddObject(self, "SocketPort", port) < 0
        || PyModule_AddIntConstant(self, "API", CORE_API) < 0)
        return NULL;
    return self;
}
