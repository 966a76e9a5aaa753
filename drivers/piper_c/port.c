/* SocketPort: a socket of equal packets, many per system call: recvmmsg(2), sendmmsg(2). */

#include "core.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define MAX_PACKETS 64
#define MAX_CALLS 8
#define MAX_SENT 16
#define CAN_PACKET_BYTES 16
#define UNIX_PACKET_BYTES 24

typedef struct {
    PyObject_HEAD
    int fd;
    bool is_unix; /* packets carry their monotonic stamp, and come unfiltered */
    int n_written; /* headers that the last call may have changed */
    bool emptied; /* the last drain found the end of the queue */
    size_t packet_bytes;
    uint8_t wanted[N_STANDARD_IDS / 8]; /* a bit for each 11-bit identifier */
    struct mmsghdr headers[MAX_PACKETS];
    struct iovec vectors[MAX_PACKETS];
    uint8_t packets[MAX_PACKETS][UNIX_PACKET_BYTES];
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(struct timespec))];
    } control[MAX_PACKETS];
} SocketPort;

static PyObject *
port_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"fd", "wanted", NULL};
    int fd;
    PyObject *wanted;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "iO", names, &fd, &wanted))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    SocketPort *self = (SocketPort *)allocate(type, 0);
    if (self == NULL)
        return NULL;
    self->fd = fd;
    self->is_unix = wanted != Py_None;
    self->packet_bytes = self->is_unix ? UNIX_PACKET_BYTES : CAN_PACKET_BYTES;
    for (int i = 0; i < MAX_PACKETS; i++) {
        self->vectors[i].iov_base = self->packets[i];
        self->vectors[i].iov_len = self->packet_bytes;
        struct msghdr *header = &self->headers[i].msg_hdr;
        header->msg_iov = &self->vectors[i];
        header->msg_iovlen = 1;
        header->msg_control = self->is_unix ? NULL : self->control[i].bytes;
    }
    self->n_written = MAX_PACKETS;
    if (self->is_unix) {
        PyObject *iterator = PyObject_GetIter(wanted), *item;
        while (iterator != NULL && (item = PyIter_Next(iterator)) != NULL) {
            unsigned long can_id = PyLong_AsUnsignedLong(item);
            Py_DECREF(item);
            if (can_id < N_STANDARD_IDS)
                self->wanted[can_id / 8] |= (uint8_t)(1u << can_id % 8);
            else if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "an identifier is below 0x800");
            if (PyErr_Occurred())
                break;
        }
        Py_XDECREF(iterator);
        if (PyErr_Occurred()) {
            Py_DECREF(self);
            return NULL;
        }
    }
    return (PyObject *)self;
}

/* Make n headers what they must be before a call: the kernel writes into those that it fills. */
static void
port_renew(SocketPort *self, int n)
{
    for (int i = 0; i < n; i++)
        self->headers[i].msg_hdr.msg_controllen = self->is_unix ? 0 : sizeof self->control[i].bytes;
}

static int64_t
realtime_stamp_ns(struct msghdr *header)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c != NULL; c = CMSG_NXTHDR(header, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec stamp;
            memcpy(&stamp, CMSG_DATA(c), sizeof stamp);
            return (int64_t)stamp.tv_sec * 1000000000 + stamp.tv_nsec;
        }
    return 0;
}

static bool
port_wants(const SocketPort *self, uint32_t can_id)
{
    if (can_id & CAN_ERR_FLAG)
        return true;
    return can_id < N_STANDARD_IDS && (self->wanted[can_id / 8] >> can_id % 8 & 1);
}

/* Drop what an interrupted drain has collected; the store tells again what it said. */
static PyObject *
give_up(FrameStore *store, PyObject *frames)
{
    if (store != NULL)
        store_forget_judged(store);
    Py_XDECREF(frames);
    return NULL;
}

static PyObject *
port_drain(PyObject *op, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    SocketPort *self = (SocketPort *)op;
    FrameStore *store = NULL;
    long long offset_ns = 0, first_ns = 0, last_ns = 0;
    if (n_arguments != 1 && n_arguments != 4) {
        PyErr_SetString(PyExc_TypeError, "drain takes a store, of CAN also an offset and two times");
        return NULL;
    }
    if (arguments[0] != Py_None) {
        if (!is_store(arguments[0])) {
            PyErr_SetString(PyExc_TypeError, "drain takes a FrameStore or None");
            return NULL;
        }
        store = (FrameStore *)arguments[0];
    }
    if (n_arguments == 4) {
        offset_ns = PyLong_AsLongLong(arguments[1]);
        first_ns = PyLong_AsLongLong(arguments[2]);
        last_ns = PyLong_AsLongLong(arguments[3]);
        if (PyErr_Occurred())
            return NULL;
    }
    PyObject *frames = NULL;
    self->emptied = false;
    for (int call = 0; call < MAX_CALLS && !self->emptied; call++) {
        port_renew(self, self->n_written);
        self->n_written = MAX_PACKETS; /* what a failing call wrote is unknown */
        int n = recvmmsg(self->fd, self->headers, MAX_PACKETS, MSG_DONTWAIT, NULL);
        if (n < 0) {
            if (errno != EAGAIN && errno != EINTR) {
                PyErr_SetFromErrno(PyExc_OSError);
                return give_up(store, frames);
            }
            n = 0;
        }
        self->n_written = n;
        /* Where the other end has closed, the kernel gives packets without a byte. */
        int n_full = n;
        while (n_full > 0 && self->headers[n_full - 1].msg_len == 0)
            n_full--;
        if (n > 0 && n_full == 0) {
            PyErr_SetNone(PyExc_EOFError);
            return give_up(store, frames);
        }
        self->emptied = n_full < MAX_PACKETS;
        for (int i = 0; i < n_full; i++) {
            const uint8_t *packet = self->packets[i];
            uint32_t can_id;
            memcpy(&can_id, packet, sizeof can_id);
            size_t length = packet[4] < DATA_BYTES ? packet[4] : DATA_BYTES;
            if (self->headers[i].msg_len != self->packet_bytes
                || self->headers[i].msg_hdr.msg_flags & MSG_TRUNC)
                length = 0; /* no frame of ours: counted as bad */
            int64_t t_ns;
            if (self->is_unix) {
                if (!port_wants(self, can_id))
                    continue;
                memcpy(&t_ns, packet + CAN_PACKET_BYTES, sizeof t_ns);
            }
            else {
                int64_t stamp_ns = realtime_stamp_ns(&self->headers[i].msg_hdr);
                /* Without a stamp the present is the best there is. */
                t_ns = stamp_ns == 0 ? last_ns : (int64_t)((uint64_t)stamp_ns + (uint64_t)offset_ns);
                t_ns = t_ns < first_ns ? first_ns : t_ns > last_ns ? last_ns : t_ns;
            }
            const uint8_t *data = packet + 8;
            if ((store == NULL || store_take(store, can_id, data, length, t_ns))
                && append_frame(&frames, can_id, data, length, t_ns) < 0)
                return give_up(store, frames);
        }
    }
    return list_or_none(frames);
}

/* Write the frame (can_id, data) into a packet. */
static int
fill_packet(PyObject *frame, uint8_t *packet)
{
    uint32_t can_id;
    char *data;
    Py_ssize_t length;
    if (!PyTuple_Check(frame)) {
        PyErr_SetString(PyExc_TypeError, "a frame is a tuple (identifier, data)");
        return -1;
    }
    if (!PyArg_ParseTuple(frame, "O&y#", read_can_id, &can_id, &data, &length))
        return -1;
    if (can_id >= N_STANDARD_IDS || length != DATA_BYTES) {
        PyErr_Format(PyExc_ValueError, "a frame is an identifier below 0x800 and 8 bytes, got %x "
                     "and %zd bytes", can_id, length);
        return -1;
    }
    memcpy(packet, &can_id, sizeof can_id);
    packet[4] = DATA_BYTES;
    memcpy(packet + 8, data, DATA_BYTES);
    return 0;
}

static PyObject *
port_send(PyObject *op, PyObject *argument)
{
    SocketPort *self = (SocketPort *)op;
    PyObject *frames = PySequence_Tuple(argument);
    if (frames == NULL)
        return NULL;
    Py_ssize_t count = PyTuple_Size(frames);
    if (count > MAX_SENT) {
        PyErr_Format(PyExc_ValueError, "at most %d frames per call, got %zd", MAX_SENT, count);
        Py_DECREF(frames);
        return NULL;
    }
    uint8_t packets[MAX_SENT][UNIX_PACKET_BYTES];
    struct iovec vectors[MAX_SENT];
    struct mmsghdr headers[MAX_SENT];
    size_t n = (size_t)count;
    memset(packets, 0, n * sizeof packets[0]);
    memset(headers, 0, n * sizeof headers[0]);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t t_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    for (size_t i = 0; i < n; i++) {
        if (fill_packet(PyTuple_GetItem(frames, (Py_ssize_t)i), packets[i]) < 0) {
            Py_DECREF(frames);
            return NULL;
        }
        if (self->is_unix)
            memcpy(packets[i] + CAN_PACKET_BYTES, &t_ns, sizeof t_ns);
        vectors[i].iov_base = packets[i];
        vectors[i].iov_len = self->packet_bytes;
        headers[i].msg_hdr.msg_iov = &vectors[i];
        headers[i].msg_hdr.msg_iovlen = 1;
    }
    Py_DECREF(frames);
    int sent = sendmmsg(self->fd, headers, (unsigned)n, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromLong(sent);
}

static PyMethodDef port_methods[] = {
    {"drain", (PyCFunction)(void (*)(void))port_drain, METH_FASTCALL, NULL},
    {"send", port_send, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef port_members[] = {
    {"emptied", T_BOOL, offsetof(SocketPort, emptied), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot port_slots[] = {
    {Py_tp_new, port_new},
    {Py_tp_dealloc, plain_dealloc},
    {Py_tp_methods, port_methods},
    {Py_tp_members, port_members},
    {0, NULL},
};

static PyType_Spec port_spec = {
    .name = "gwp_edge.drivers.piper_native.SocketPort",
    .basicsize = sizeof(SocketPort),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = port_slots,
};

PyObject *
make_port_type(void)
{
    return PyType_FromSpec(&port_spec);
}
