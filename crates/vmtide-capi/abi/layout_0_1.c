/* The structures and numbers of version 0.1 as programs were built with them: compiled against the header of today, so
 * that none of it changes. 64-bit systems. */
#include <stddef.h>
#include <vmtide.h>

#define SIZE(type, bytes) _Static_assert(sizeof(type) >= (bytes), #type " lost members")
#define AT(type, member, offset) _Static_assert(offsetof(type, member) == (offset), #type "." #member " moved")
#define IS(name, value) _Static_assert((name) == (value), #name " changed")

IS(VMTIDE_ABI_VERSION, 1);
IS(VMTIDE_OK, 0); IS(VMTIDE_FAILED, 1); IS(VMTIDE_INVALID, 2); IS(VMTIDE_DENIED, 4); IS(VMTIDE_DAMAGED, 5);
IS(VMTIDE_NOT_FOUND, 6); IS(VMTIDE_BAD_HANDLE, 7); IS(VMTIDE_UNSUPPORTED, 8); IS(VMTIDE_INTERNAL, 9);
IS(VMTIDE_CANCELLED, 130);
IS(VMTIDE_OPEN_WRITABLE, 1); IS(VMTIDE_OPEN_FORCE, 2); IS(VMTIDE_OPEN_ANY_PARENT, 4); IS(VMTIDE_OPEN_FOLLOW, 8); IS(VMTIDE_OPEN_TRACK, 16); IS(VMTIDE_AGENT_COMPRESS, 1);
IS(VMTIDE_EXTENT_DATA, 1); IS(VMTIDE_EXTENT_ZERO, 2); IS(VMTIDE_EXTENT_UNALLOCATED, 3);
IS(VMTIDE_NEW_OVERWRITE, 1); IS(VMTIDE_NEW_IN_PLACE, 2); IS(VMTIDE_NEW_COMPRESS, 4); IS(VMTIDE_NEW_SYNC, 8);
IS(VMTIDE_NEW_SALVAGE, 16); IS(VMTIDE_NEW_FORCE, 32);
IS(VMTIDE_LEVEL_AUTO, 0); IS(VMTIDE_LEVEL_FULL, 1); IS(VMTIDE_LEVEL_INCREMENTAL, 2); IS(VMTIDE_LEVEL_DIFFERENTIAL, 3);
IS(VMTIDE_BACKUP_CHANGES, 1); IS(VMTIDE_BACKUP_TRACK, 2);
IS(VMTIDE_DELTA_CHANGES, 1); IS(VMTIDE_DELTA_OVERWRITE, 2); IS(VMTIDE_DELTA_NO_BASE_DIGEST, 4);
IS(VMTIDE_DELTA_FINGERPRINT, 8); IS(VMTIDE_DELTA_PLAIN, 16);
IS(VMTIDE_APPLY_NO_BASE_CHECK, 1); IS(VMTIDE_APPLY_FORCE, 2);

_Static_assert(sizeof(vmtide_handle) == 8 && sizeof(vmtide_status) == 4, "handles or statuses changed");
SIZE(vmtide_watch, 40);
AT(vmtide_watch, context, 8); AT(vmtide_watch, progress, 16); AT(vmtide_watch, message, 24); AT(vmtide_watch, cancel, 32);
SIZE(vmtide_open_options, 40);
AT(vmtide_open_options, format, 8); AT(vmtide_open_options, snapshot, 16); AT(vmtide_open_options, search, 24);
AT(vmtide_open_options, flags, 32); AT(vmtide_open_options, reserved, 36);
_Static_assert(sizeof(vmtide_extent) == 24 && sizeof(vmtide_range) == 16, "elements of arrays changed");
AT(vmtide_extent, length, 8); AT(vmtide_extent, kind, 16); AT(vmtide_range, length, 8);
SIZE(vmtide_new_options, 48);
AT(vmtide_new_options, format, 8); AT(vmtide_new_options, subformat, 16); AT(vmtide_new_options, parent, 24);
AT(vmtide_new_options, block_size_bytes, 32); AT(vmtide_new_options, flags, 40); AT(vmtide_new_options, workers, 44);
SIZE(vmtide_backup_options, 72);
AT(vmtide_backup_options, name, 8); AT(vmtide_backup_options, format, 16); AT(vmtide_backup_options, state_directory, 24);
AT(vmtide_backup_options, changes, 32); AT(vmtide_backup_options, changes_count, 40); AT(vmtide_backup_options, agent, 48);
AT(vmtide_backup_options, level, 56);
AT(vmtide_backup_options, flags, 60); AT(vmtide_backup_options, check_unchanged, 64);
AT(vmtide_backup_options, workers, 68);
SIZE(vmtide_agent_options, 48);
AT(vmtide_agent_options, key, 8); AT(vmtide_agent_options, key_length, 16); AT(vmtide_agent_options, fingerprint, 24);
AT(vmtide_agent_options, ca_file, 32); AT(vmtide_agent_options, flags, 40); AT(vmtide_agent_options, reserved, 44);
SIZE(vmtide_delta_options, 80);
AT(vmtide_delta_options, base, 8); AT(vmtide_delta_options, base_id, 16); AT(vmtide_delta_options, new_id, 24);
AT(vmtide_delta_options, changes, 32); AT(vmtide_delta_options, changes_count, 40); AT(vmtide_delta_options, flags, 48);
AT(vmtide_delta_options, level, 52); AT(vmtide_delta_options, granularity_bytes, 56); AT(vmtide_delta_options, workers, 60);
AT(vmtide_delta_options, source_options, 64); AT(vmtide_delta_options, base_options, 72);
SIZE(vmtide_apply_options, 40);
AT(vmtide_apply_options, format, 8); AT(vmtide_apply_options, child, 16); AT(vmtide_apply_options, target_id, 24);
AT(vmtide_apply_options, flags, 32); AT(vmtide_apply_options, workers, 36);
