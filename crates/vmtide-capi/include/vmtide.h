/* libvmtide: disk images, repositories and deltas of vmtide, for C and whatever calls C.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Rules
 * -----
 * Handles. Everything that is open is a number: a vmtide_handle that is not 0. They are never used
 * again, so a handle that was closed, that never was, or that is of another kind is an error
 * (VMTIDE_BAD_HANDLE) and never undefined. vmtide_close() closes all kinds, once.
 *
 * Errors. Every function that can fail returns a vmtide_status; 0 is success. Where `error` is not
 * NULL it gets an error object, or 0 on success; vmtide_error_message() says in one line what failed,
 * where and what to do, and vmtide_close() frees it. Outputs are written only on success, and are set
 * to 0 on failure. No function ends the process, and no panic crosses.
 *
 * Strings. In: UTF-8 that ends with a 0 byte, which is read during the call only. Out: a vmtide_text,
 * JSON unless said otherwise, as the commands' --json summaries; closed by the caller.
 *
 * Structures. The caller sets struct_size to sizeof of it, and everything unused to 0. A later version
 * adds members at the end; a library that does not know a member refuses it if it is not 0, and a size that
 * the structure never had is VMTIDE_INVALID. NULL for a structure of options means all defaults.
 *
 * Threads. Any function may be called from any thread at any time, also with the same handle; reads
 * and writes of one image run at once. vmtide_close() lets calls that are under way with the handle end as if
 * it were open, and what it stands for is let go when the last of them ends. It waits for none of them but
 * those that write to the image that it closes: what they answered with VMTIDE_OK is in the image then. A
 * write that another thread begins meanwhile is VMTIDE_BAD_HANDLE.
 * Callbacks are called on the thread that made the call, one at a time, and never after it returned;
 * they may call any function of this library. A callback must return; it must not throw or longjmp.
 *
 * Signals and environment. The library installs no signal handlers. Repositories in S3 take their
 * keys from the AWS_* variables and ~/.aws. Start no child by fork() without exec while calls run.
 *
 * Compatibility. Symbols carry versions (VMTIDE_0.1). Within one VMTIDE_ABI_VERSION functions,
 * structures and numbers only get more.
 */
#ifndef VMTIDE_H
#define VMTIDE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VMTIDE_ABI_VERSION 1u

/* What came of a call. */
typedef int32_t vmtide_status;
#define VMTIDE_OK 0
#define VMTIDE_FAILED 1        /* for a reason without a number of its own */
#define VMTIDE_INVALID 2       /* an argument is NULL, no UTF-8, out of range, or makes no sense */
#define VMTIDE_DENIED 4        /* wrong password, or no permission */
#define VMTIDE_DAMAGED 5       /* the bytes are there and wrong */
#define VMTIDE_NOT_FOUND 6
#define VMTIDE_BAD_HANDLE 7    /* closed, never given out, or of another kind */
#define VMTIDE_UNSUPPORTED 8   /* valid, and this library or this image cannot do it */
#define VMTIDE_INTERNAL 9      /* a fault in the library; please report it */
#define VMTIDE_CANCELLED 130

typedef uint64_t vmtide_handle;
typedef vmtide_handle vmtide_error;
typedef vmtide_handle vmtide_text;
typedef vmtide_handle vmtide_cancel;
typedef vmtide_handle vmtide_image;
typedef vmtide_handle vmtide_repository;
typedef vmtide_handle vmtide_ranges;

/* VMTIDE_ABI_VERSION of the library at run time; a program asks before anything else. */
uint32_t vmtide_abi_version(void);
/* The version of vmtide, e.g. "0.1.0". Lives for ever. */
const char *vmtide_version(void);

/* Closes a handle of any kind. An image that was open for writing is brought to the medium and left as
 * its format wants a closed image to be; what fails then is told here. */
vmtide_status vmtide_close(vmtide_handle handle, vmtide_error *error);
/* The number of handles that are open, of all kinds; for tests against leaks. */
uint64_t vmtide_open_handles(void);

/* The status that an error stands for; VMTIDE_BAD_HANDLE for what is no error. */
vmtide_status vmtide_error_status(vmtide_error error);
/* One line, until the error is closed; NULL for what is no error. */
const char *vmtide_error_message(vmtide_error error);

/* The bytes of a text, ended by a 0, until it is closed; NULL for what is no text. */
const char *vmtide_text_data(vmtide_text text);
/* Their number, without the 0. */
uint64_t vmtide_text_size(vmtide_text text);

typedef struct vmtide_range {
    uint64_t offset;
    uint64_t length;
} vmtide_range;

/* Ranges that a call answered with, sorted and merged, until they are closed; NULL for what is none. */
const vmtide_range *vmtide_ranges_data(vmtide_ranges ranges);
uint64_t vmtide_ranges_count(vmtide_ranges ranges);

/* A flag by which long calls are ended from another thread. One flag may serve many calls. */
vmtide_status vmtide_cancel_new(vmtide_cancel *cancel, vmtide_error *error);
/* Asks all calls that were given the flag to end with VMTIDE_CANCELLED. Final. */
vmtide_status vmtide_cancel_request(vmtide_cancel cancel, vmtide_error *error);

/* How a long call is watched. */
typedef struct vmtide_watch {
    uint64_t struct_size;
    void *context;
    /* Some ten times a second and at the end; total is 0 while unknown, moved is what was really read
     * or written. Anything but 0 cancels. May be NULL. */
    int32_t (*progress)(void *context, uint64_t done_bytes, uint64_t total_bytes, uint64_t moved_bytes);
    /* Steps and warnings, as JSON. May be NULL. */
    void (*message)(void *context, const char *json);
    /* 0, or a flag. */
    vmtide_cancel cancel;
} vmtide_watch;

/* ---- images ------------------------------------------------------------------------------- */

#define VMTIDE_OPEN_WRITABLE 1u   /* an image or block device; nobody else may have it open */
#define VMTIDE_OPEN_FORCE 2u      /* write even where other images read through it, which breaks them */
#define VMTIDE_OPEN_ANY_PARENT 4u /* take a parent that was changed after its child was made */
#define VMTIDE_OPEN_FOLLOW 8u     /* open any file that the image names, not only those beside it */
#define VMTIDE_OPEN_TRACK 16u     /* with WRITABLE: track what is written, if tracking is on (see below) */

typedef struct vmtide_open_options {
    uint64_t struct_size;
    const char *format;   /* raw, qcow2, vhdx, vhd, vmdk; NULL finds it by content */
    const char *snapshot; /* an internal snapshot of a qcow2 image, by id or name */
    const char *search;   /* a directory in which parents are looked for, too */
    uint32_t flags;       /* VMTIDE_OPEN_… */
    uint32_t reserved;
    const char *backing_format; /* the format of parents of which their qcow2 child does not say it */
} vmtide_open_options;

/* Opens a disk image with its chain, a block device, or an NBD URL (nbd://…, nbd+unix://…). */
vmtide_status vmtide_image_open(const char *source, const vmtide_open_options *options,
                                vmtide_image *image, vmtide_error *error);
/* The size of the disk in bytes. */
vmtide_status vmtide_image_size(vmtide_image image, uint64_t *size_bytes, vmtide_error *error);
/* Fills all of the buffer, or fails. Of a restore point every byte was verified. */
vmtide_status vmtide_image_read(vmtide_image image, uint64_t offset, void *buffer, uint64_t length,
                                vmtide_error *error);
/* On the medium only after vmtide_image_flush(). */
vmtide_status vmtide_image_write(vmtide_image image, uint64_t offset, const void *data, uint64_t length,
                                 vmtide_error *error);
vmtide_status vmtide_image_write_zeroes(vmtide_image image, uint64_t offset, uint64_t length,
                                        vmtide_error *error);
vmtide_status vmtide_image_flush(vmtide_image image, vmtide_error *error);
vmtide_status vmtide_image_resize(vmtide_image image, uint64_t size_bytes, vmtide_error *error);

#define VMTIDE_EXTENT_DATA 1u
#define VMTIDE_EXTENT_ZERO 2u
#define VMTIDE_EXTENT_UNALLOCATED 3u /* reads as zeros */

typedef struct vmtide_extent {
    uint64_t offset;
    uint64_t length;
    uint32_t kind; /* VMTIDE_EXTENT_… */
    uint32_t reserved;
} vmtide_extent;

/* What a range holds, without reading it: up to `capacity` extents, which cover the range from its
 * beginning, but not always to its end: ask again from where they end. */
vmtide_status vmtide_image_extents(vmtide_image image, uint64_t offset, uint64_t length,
                                   vmtide_extent *extents, uint64_t capacity, uint64_t *count,
                                   vmtide_error *error);
/* What an image file says of itself. `format` as in vmtide_open_options. */
vmtide_status vmtide_image_info(const char *path, const char *format, vmtide_text *info,
                                vmtide_error *error);

#define VMTIDE_NEW_OVERWRITE 1u /* replace what is there */
#define VMTIDE_NEW_IN_PLACE 2u  /* change an existing target where it differs (convert, restore) */
#define VMTIDE_NEW_COMPRESS 4u  /* qcow2; streamOptimized VMDK always is */
#define VMTIDE_NEW_SYNC 8u      /* end only when it is on the medium (convert) */
#define VMTIDE_NEW_SALVAGE 16u  /* zeros in place of what is damaged (restore) */
#define VMTIDE_NEW_FORCE 32u    /* even where other images read through the target */

typedef struct vmtide_new_options {
    uint64_t struct_size;
    const char *format;       /* NULL: by the extension of the target */
    const char *subformat;    /* e.g. fixed, dynamic, streamOptimized */
    const char *parent;       /* create: the image that it shall be a child of */
    uint64_t block_size_bytes;
    uint32_t flags;           /* VMTIDE_NEW_… */
    uint32_t workers;         /* 0 suits the machine */
} vmtide_new_options;

/* Makes an empty image. A size of 0 takes the parent's. */
vmtide_status vmtide_image_create(const char *path, uint64_t size_bytes,
                                  const vmtide_new_options *options, vmtide_error *error);
/* Copies a disk into another format, file, device or NBD export. */
vmtide_status vmtide_convert(const char *source, const vmtide_open_options *source_options,
                             const char *target, const vmtide_new_options *target_options,
                             const vmtide_watch *watch, vmtide_text *summary, vmtide_error *error);

/* ---- agents and change tracking ------------------------------------------------------------ */

#define VMTIDE_AGENT_COMPRESS 1u /* have disks compressed on the way */

/* How an agent is reached. */
typedef struct vmtide_agent_options {
    uint64_t struct_size;
    const void *key;         /* the agent's key; NULL for an agent that needs none */
    uint64_t key_length;
    const char *fingerprint; /* the SHA-256 of its certificate; NULL: authorities are asked */
    const char *ca_file;     /* authorities (PEM); NULL: those of the system */
    uint32_t flags;          /* VMTIDE_AGENT_… */
    uint32_t reserved;
} vmtide_agent_options;

/* Opens a live disk of an agent's host for reading: agent+https://HOST[:PORT]/PATH. */
vmtide_status vmtide_agent_open_disk(const char *url, const vmtide_agent_options *agent, vmtide_image *image,
                                     vmtide_error *error);
/* Change tracking of a disk. `source` is the path of an image that is open in nobody but a program that
 * tracks (vmtide track, or this library with VMTIDE_OPEN_TRACK), or the URL of an agent's disk.
 * The state: {"enabled":…,"newer_changes":…,"most_recent_id":…}. */
vmtide_status vmtide_tracking_state(const char *source, const vmtide_agent_options *agent, vmtide_text *state,
                                    vmtide_error *error);
/* Switches it on, or with `enable` 0 off, which forgets all ids. */
vmtide_status vmtide_tracking_enable(const char *source, const vmtide_agent_options *agent, int32_t enable,
                                     vmtide_error *error);
/* Seals this moment of an image; the answer is its id, as plain text. */
vmtide_status vmtide_tracking_checkpoint(const char *path, vmtide_text *id, vmtide_error *error);
/* All that may have changed since an id. An error where that is not surely known: the disk is to be read
 * in full then. */
vmtide_status vmtide_tracking_changes(const char *source, const vmtide_agent_options *agent, const char *since,
                                      vmtide_ranges *changes, vmtide_error *error);

/* ---- repositories ------------------------------------------------------------------------- */

/* Makes a repository: a directory, file:///DIRECTORY or s3://BUCKET/PREFIX. Without a password
 * (NULL, 0) it is not encrypted. */
vmtide_status vmtide_repository_init(const char *location, const void *password, uint64_t password_length,
                                     vmtide_error *error);
vmtide_status vmtide_repository_open(const char *location, const void *password, uint64_t password_length,
                                     vmtide_repository *repository, vmtide_error *error);
/* The restore points of one VM, or of all (NULL), oldest first: {"points":[…],"unreadable":[…]}. */
vmtide_status vmtide_repository_points(vmtide_repository repository, const char *vm, vmtide_text *points,
                                       vmtide_error *error);
/* Opens a disk of a restore point for reading; with NULL the only one. `point`: an id or the beginning
 * of one, VM@latest, VM@TIME. */
vmtide_status vmtide_repository_open_disk(vmtide_repository repository, const char *point,
                                          const char *disk, vmtide_image *image, vmtide_error *error);
/* What differs between two restore points: {"disks":[{"id":…,"ranges":[{"offset":…,"length":…},…]},…]}. */
vmtide_status vmtide_repository_diff(vmtide_repository repository, const char *from, const char *to,
                                     vmtide_text *difference, vmtide_error *error);

/* The ranges of a disk (NULL: the only one) that differ between two restore points. */
vmtide_status vmtide_repository_changes(vmtide_repository repository, const char *from, const char *to,
                                        const char *disk, vmtide_ranges *changes, vmtide_error *error);

#define VMTIDE_LEVEL_AUTO 0
#define VMTIDE_LEVEL_FULL 1
#define VMTIDE_LEVEL_INCREMENTAL 2
#define VMTIDE_LEVEL_DIFFERENTIAL 3

#define VMTIDE_BACKUP_CHANGES 1u /* `changes` says all that may differ from the previous restore point */
#define VMTIDE_BACKUP_TRACK 2u   /* begin change tracking: of an agent's disk; in a qcow2 image at rest (needs QEMU's tools) */

typedef struct vmtide_backup_options {
    uint64_t struct_size;
    const char *name;            /* of the VM in the repository; NULL: the file's name */
    const char *format;          /* of an image source */
    /* For journals and locks. Only the program's own user may be able to make files there: journals say
     * what is to be removed. All that back up one VM must use the same. NULL: as the command,
     * $XDG_STATE_HOME/vmtide; /var/lib/vmtide for root; ~/.local/state/vmtide; on Windows
     * %LOCALAPPDATA%\vmtide. */
    const char *state_directory;
    const vmtide_range *changes;
    uint64_t changes_count;
    const vmtide_agent_options *agent; /* of a source agent+https:// */
    int32_t level;               /* VMTIDE_LEVEL_… */
    uint32_t flags;              /* VMTIDE_BACKUP_… */
    uint32_t check_unchanged;    /* so many blocks said to be unchanged are compared */
    uint32_t workers;
} vmtide_backup_options;

/* Backs up an image, block device, NBD export, QEMU (qemu+unix:///SOCKET) or disks of an agent. */
vmtide_status vmtide_backup(vmtide_repository repository, const char *source,
                            const vmtide_backup_options *options, const vmtide_watch *watch,
                            vmtide_text *summary, vmtide_error *error);
/* Restores the disks of a point to a file, a directory, a device or an NBD export; of `options` the
 * format, the subformat, the flags and the workers count. `disk` NULL: all. */
vmtide_status vmtide_restore(vmtide_repository repository, const char *point, const char *disk,
                             const char *target, const vmtide_new_options *options,
                             const vmtide_watch *watch, vmtide_text *summary, vmtide_error *error);

/* ---- deltas: docs/delta-format.md ---------------------------------------------------------- */

/* Takes the next bytes of a delta; anything but 0 fails the call. */
typedef int32_t (*vmtide_write_callback)(void *context, const void *data, uint64_t length);
/* Gives at most `capacity` bytes of a delta: their number, 0 at the end, or below 0 to fail the call. */
typedef int64_t (*vmtide_read_callback)(void *context, void *buffer, uint64_t capacity);

#define VMTIDE_DELTA_CHANGES 1u        /* `changes` says all that may differ */
#define VMTIDE_DELTA_OVERWRITE 2u      /* replace an existing file */
#define VMTIDE_DELTA_NO_BASE_DIGEST 4u /* do not read the base */
#define VMTIDE_DELTA_FINGERPRINT 8u    /* a fingerprint of the whole base */
#define VMTIDE_DELTA_PLAIN 16u         /* do not compress */

typedef struct vmtide_delta_options {
    uint64_t struct_size;
    const char *base;          /* the disk as it was: a path or NBD URL; may be NULL with changes */
    const char *base_id;       /* the name of that moment */
    const char *new_id;        /* the name of this moment */
    const vmtide_range *changes;
    uint64_t changes_count;
    uint32_t flags;            /* VMTIDE_DELTA_… */
    int32_t level;             /* of zstd; 0: the default, 1 */
    uint32_t granularity_bytes; /* 0: 4096 */
    uint32_t workers;
    /* How the image and the base are opened; of the flags VMTIDE_OPEN_ANY_PARENT and VMTIDE_OPEN_FOLLOW.
     * NULL finds the format by content: give it for raw images, for a guest decides what those hold. */
    const vmtide_open_options *source_options;
    const vmtide_open_options *base_options;
} vmtide_delta_options;

/* Makes a delta of an image into the file `output`, or with NULL by way of `write`. */
vmtide_status vmtide_delta_create(const char *source, const vmtide_delta_options *options,
                                  const char *output, vmtide_write_callback write, void *write_context,
                                  const vmtide_watch *watch, vmtide_text *summary, vmtide_error *error);
/* The same of a disk of two restore points (NULL: the only disk). Of `options` the names, level, granularity, flags
 * and workers count. */
vmtide_status vmtide_delta_create_points(vmtide_repository repository, const char *from, const char *to,
                                         const char *disk, const vmtide_delta_options *options,
                                         const char *output, vmtide_write_callback write,
                                         void *write_context, const vmtide_watch *watch,
                                         vmtide_text *summary, vmtide_error *error);
/* What the delta in a file says of itself; with `verify` not 0 every byte is checked. */
vmtide_status vmtide_delta_info(const char *path, int32_t verify, vmtide_text *info, vmtide_error *error);
/* Makes one of several that follow each other, the oldest first. Of `options` the level, flags and
 * workers count. */
vmtide_status vmtide_delta_merge(const char *const *paths, uint64_t path_count,
                                 const vmtide_delta_options *options, const char *output,
                                 vmtide_write_callback write, void *write_context,
                                 const vmtide_watch *watch, vmtide_text *summary, vmtide_error *error);

#define VMTIDE_APPLY_NO_BASE_CHECK 1u
#define VMTIDE_APPLY_FORCE 2u

typedef struct vmtide_apply_options {
    uint64_t struct_size;
    const char *format;    /* of the target */
    const char *child;     /* leave the target alone, and make this child of it */
    const char *target_id; /* the moment that the target is at */
    uint32_t flags;        /* VMTIDE_APPLY_… */
    uint32_t workers;
} vmtide_apply_options;

/* Applies the delta in the file `delta`, or with NULL the one that `read` gives, which is kept beside the
 * target until all of it is checked. */
vmtide_status vmtide_delta_apply(const char *delta, vmtide_read_callback read, void *read_context,
                                 const char *target, const vmtide_apply_options *options,
                                 const vmtide_watch *watch, vmtide_text *summary, vmtide_error *error);

#ifdef __cplusplus
}
#endif

#endif
