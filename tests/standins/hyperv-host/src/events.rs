//! What happens on a host besides backups: administrators, guests, power, other products.

use crate::random::Random;
use crate::services::reference::ConvertPoint;
use crate::services::snapshot::NewSnapshot;
use crate::world::World;
use uuid::Uuid;
use vmtide_cim::CimValue;

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest writes here and there.
    Writes,
    /// A checkpoint by a user.
    UserCheckpoint,
    /// A checkpoint by a user is removed.
    RemoveUserCheckpoint,
    /// The VM is turned off, goes back to a checkpoint by a user, and is started.
    Revert,
    /// The VM is turned off and on.
    PowerCycle,
    /// The host crashes and is started again.
    HostCrash,
    /// The VM moves to another host and back.
    LiveMigration,
    /// A disk grows.
    Resize,
    /// A disk is added.
    AddDisk,
    /// The last disk is taken away.
    RemoveDisk,
    /// The VM gets another name.
    Rename,
    /// Another product makes a reference point.
    OtherProduct,
}

/// All of them.
const EVENTS: [Event; 12] = [
    Event::Writes,
    Event::UserCheckpoint,
    Event::RemoveUserCheckpoint,
    Event::Revert,
    Event::PowerCycle,
    Event::HostCrash,
    Event::LiveMigration,
    Event::Resize,
    Event::AddDisk,
    Event::RemoveDisk,
    Event::Rename,
    Event::OtherProduct,
];

impl World {
    /// Lets one thing happen to a VM by chance; what it was.
    pub fn disturb(&self, vm: Uuid, random: &mut Random) -> Event {
        let event = if random.one_in(2) {
            Event::Writes
        } else {
            random.choose(&EVENTS).copied().unwrap_or(Event::Writes)
        };
        self.happen(vm, event, random);
        event
    }

    /// Lets something happen to a VM.
    pub fn happen(&self, vm: Uuid, event: Event, random: &mut Random) {
        match event {
            Event::Writes => self.write_around(vm, random, 8),
            Event::UserCheckpoint => drop(self.user_checkpoint(vm)),
            Event::RemoveUserCheckpoint => {
                if let Some((id, _, _)) = self.snapshots(vm).into_iter().find(|s| !s.2) {
                    self.remove_checkpoint(id);
                }
            }
            Event::Revert => {
                if let Some((id, _, _)) = self.snapshots(vm).into_iter().find(|s| !s.2) {
                    self.revert(id);
                }
            }
            Event::PowerCycle => {
                self.set_running(vm, false);
                self.set_running(vm, true);
            }
            Event::HostCrash => self.crash(),
            Event::LiveMigration => self.live_migrate(vm),
            Event::Resize => {
                let disks = self.disks(vm).len();
                if disks > 0 && self.snapshots(vm).is_empty() {
                    let disk = usize::try_from(random.below(disks as u64)).unwrap_or(0);
                    let size = self.content(vm, disk).size_bytes();
                    self.resize(vm, disk, size + (1 << 20));
                }
            }
            Event::AddDisk => {
                let location = u32::try_from(20 + random.below(40)).unwrap_or(20);
                let taken = format!(r"\{location}\L");
                if !self.disks(vm).iter().any(|(suffix, _)| suffix.ends_with(&taken)) {
                    self.attach_disk(vm, &crate::DiskSpec::scsi(location, 1 << 20));
                }
            }
            Event::RemoveDisk => {
                let disks = self.disks(vm).len();
                if disks > 1 && self.snapshots(vm).is_empty() {
                    self.detach(vm, disks - 1);
                }
            }
            Event::Rename => self.rename(vm, &format!("vm-{}", random.below(1000))),
            Event::OtherProduct => drop(self.foreign_reference_point(vm)),
        }
    }

    /// The guest writes at `times` places of all its disks.
    pub fn write_around(&self, vm: Uuid, random: &mut Random, times: u64) {
        let disks = self.disks(vm).len();
        for _ in 0..times {
            if disks == 0 {
                return;
            }
            let disk = usize::try_from(random.below(disks as u64)).unwrap_or(0);
            let size = self.content(vm, disk).size_bytes();
            let length = 512 * (1 + random.below(32));
            let length = length.min(size);
            let offset = random.below((size - length) / 512 + 1) * 512;
            let data = random.bytes(usize::try_from(length).unwrap_or(512));
            self.write(vm, disk, offset, &data);
        }
    }

    /// A user makes a checkpoint; its id.
    pub fn user_checkpoint(&self, vm: Uuid) -> Option<Uuid> {
        self.checkpoint(vm, false)
    }

    /// Another product makes a checkpoint for its own backup, and does not remove it; its id.
    pub fn foreign_recovery_checkpoint(&self, vm: Uuid) -> Option<Uuid> {
        self.checkpoint(vm, true)
    }

    fn checkpoint(&self, vm: Uuid, recovery: bool) -> Option<Uuid> {
        let mut state = self.lock();
        state.catch_up();
        let new = NewSnapshot { vm, recovery, consistency: 2, skip_others: true, by_other: true };
        let made = state.create_snapshot(new).ok()?;
        let (path, _) = made.last()?;
        crate::services::arguments::id_of(path.key("InstanceID")?)
    }

    /// Another product makes a reference point of its own; its `InstanceID`.
    pub fn foreign_reference_point(&self, vm: Uuid) -> Option<String> {
        if self.snapshots(vm).iter().any(|(_, _, recovery)| *recovery) {
            return None;
        }
        let snapshot = self.checkpoint(vm, true)?;
        let mut state = self.lock();
        let made = state.convert_snapshot(&ConvertPoint { snapshot }).ok()?;
        let (path, _) = made.last()?;
        path.key("InstanceID").map(str::to_owned)
    }

    /// Removes a checkpoint.
    pub fn remove_checkpoint(&self, id: Uuid) {
        let mut state = self.lock();
        drop(state.destroy_snapshots(&[id]));
        state.catch_up();
    }

    /// Turns the VM of a checkpoint off, goes back to the checkpoint, and starts the VM again.
    pub fn revert(&self, snapshot: Uuid) {
        let mut state = self.lock();
        let Some(vm) = state.snapshots.get(&snapshot).map(|snapshot| snapshot.vm) else { return };
        // Hyper-V refuses while a backup holds the VM.
        if state.snapshots.values().any(|other| other.vm == vm && other.recovery) {
            return;
        }
        let was = state.vms.get(&vm).map_or(3, |vm| vm.state);
        drop(state.set_vm_state(vm, 3));
        state.apply_snapshot(snapshot).expect("the checkpoint can be applied");
        drop(state.set_vm_state(vm, was));
    }

    /// The VM moves to another host and does not come back: what the host had of it is gone, but for its files.
    pub fn remove_vm(&self, vm: Uuid) {
        let mut state = self.lock();
        drop(state.set_vm_state(vm, 3));
        state.vms.remove(&vm);
        state.snapshots.retain(|_, snapshot| snapshot.vm != vm);
        state.points.retain(|_, point| point.vm != vm);
        state.note(format!("{vm} has left the host"));
    }

    /// Starts a VM or turns it off.
    pub fn set_running(&self, vm: Uuid, running: bool) {
        let mut state = self.lock();
        drop(state.set_vm_state(vm, if running { 2 } else { 3 }));
    }

    /// The host loses power and is started again: jobs are gone, the tracking in memory is lost, VMs that ran
    /// are started again.
    pub fn crash(&self) {
        let mut state = self.lock();
        state.note("the host crashed");
        state.jobs.clear();
        state.handles.clear();
        let coarse = state.options.coarse_bytes;
        let keys: Vec<u64> = state.disks.keys().copied().collect();
        for key in keys {
            state.close_writer(key).expect("the disk of the VM");
            if let Some(disk) = state.disks.get_mut(&key) {
                disk.merge = None;
                let size_bytes = disk.content.size_bytes();
                disk.tracking.coarsen(coarse, size_bytes);
            }
        }
    }

    /// The VM moves to another host and back: what is tracked goes with it, coarser.
    pub fn live_migrate(&self, vm: Uuid) {
        let mut state = self.lock();
        let Some(found) = state.vms.get(&vm) else { return };
        let paths: Vec<String> =
            found.configuration.disk_paths().map(|(_, path)| path.to_owned()).collect();
        for path in paths {
            let Some(key) = state.disk_of(&path) else { continue };
            state.close_writer(key).expect("the disk of the VM");
            if let Some(disk) = state.disks.get_mut(&key) {
                let size_bytes = disk.content.size_bytes();
                disk.tracking.coarsen(64 << 10, size_bytes);
            }
        }
        state.note("live migration");
    }

    /// Changes the size of a disk.
    pub fn resize(&self, vm: Uuid, disk: usize, size_bytes: u64) {
        let key = self.key(vm, disk);
        let mut state = self.lock();
        state.catch_up();
        if state.disks[&key].files.len() == 1 {
            state.resize_disk(key, size_bytes).expect("the disk grows");
        }
    }

    /// Takes a disk away from a VM; its files stay.
    pub fn detach(&self, vm: Uuid, disk: usize) {
        let (suffix, _) = self.disks(vm)[disk].clone();
        let drive = suffix.strip_suffix('L').map(|start| format!("{start}D"));
        let mut state = self.lock();
        if let Some(vm) = state.vms.get_mut(&vm) {
            let resources = &mut vm.configuration.resources;
            resources.retain(|r| r.suffix != suffix && Some(&r.suffix) != drive.as_ref());
        }
    }

    /// Moves a disk to another location on its controller.
    pub fn move_disk(&self, vm: Uuid, disk: usize, location: u32) {
        let (suffix, _) = self.disks(vm)[disk].clone();
        let mut parts: Vec<&str> = suffix.split('\\').collect();
        let old = parts.join("\\").trim_end_matches('L').to_owned();
        let number = location.to_string();
        let at = parts.len() - 2;
        parts[at] = &number;
        let new = parts.join("\\").trim_end_matches('L').to_owned();
        let mut state = self.lock();
        let Some(vm) = state.vms.get_mut(&vm) else { return };
        for resource in &mut vm.configuration.resources {
            if resource.suffix == format!("{old}D") {
                resource.suffix = format!("{new}D");
                resource.values.set("AddressOnParent", number.as_str());
            } else if resource.suffix == format!("{old}L") {
                resource.suffix = format!("{new}L");
                resource.parent = Some(format!("{new}D"));
            }
        }
    }

    /// Gives a VM another name.
    pub fn rename(&self, vm: Uuid, name: &str) {
        self.set(vm, "ElementName", name);
    }

    /// Sets a property of the settings of a VM or checkpoint, as an administrator or Hyper-V itself does.
    pub fn set(&self, id: Uuid, name: &str, value: impl Into<CimValue>) {
        let mut state = self.lock();
        if let Some(vm) = state.vms.get_mut(&id) {
            vm.configuration.settings.set(name, value);
        } else if let Some(snapshot) = state.snapshots.get_mut(&id) {
            snapshot.configuration.settings.set(name, value);
        }
        drop(state.write_configuration(id));
    }
}
