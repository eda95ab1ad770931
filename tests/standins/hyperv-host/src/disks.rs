//! Disks and their files: written by the guest, frozen by checkpoints, merged when nothing holds them apart.

use crate::content::Content;
use crate::images::{self, NewImage};
use crate::state::{Disk, FrozenDisk, Node, State};
use crate::tracking::Tracking;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::ByteRange;
use vmtide_image::{Format, ImageWriter};

impl State {
    /// Makes a disk with its file; its key.
    pub(crate) fn new_disk(&mut self, path: &str, new: &NewImage) -> vmtide_block::Result<u64> {
        let writer = images::create(&self.own(path), new)?;
        writer.finish()?;
        let tracking = Tracking::new(&mut self.random, self.options.granularity_bytes);
        let disk = Disk {
            format: new.format,
            disk_id: new.disk_id.unwrap_or_default(),
            files: [(path.to_owned(), Node::default())].into(),
            live: path.to_owned(),
            content: Content::new(new.size_bytes),
            tracking,
            writer: None,
            merge: None,
        };
        let key = self.number();
        self.disks.insert(key, disk);
        Ok(key)
    }

    /// The disk at `path`, taken into the host's care where it is a file that somebody put there: a restored
    /// disk becomes one of the host when it is attached.
    pub(crate) fn adopt_disk(&mut self, path: &str) -> Result<u64, String> {
        if let Some(key) = self.disk_of(path) {
            return Ok(key);
        }
        let local = self.local(path).ok_or_else(|| format!("{path} is no path"))?;
        if !local.is_file() {
            return Err(format!("{path} was not found (0x80070002)"));
        }
        let info = vmtide_image::image_info(&local, None).map_err(|error| error.to_string())?;
        if !matches!(info.format, Format::Vhdx | Format::Vhd) {
            return Err(format!("{path} is no virtual hard disk"));
        }
        let content = images::open(&local).and_then(|device| Content::of(&*device));
        let content = content.map_err(|error| error.to_string())?;
        let disk_id = info.identifiers.get("virtual_disk_id").and_then(|id| id.parse().ok());
        let tracking = Tracking::new(&mut self.random, self.options.granularity_bytes);
        let disk = Disk {
            format: info.format,
            disk_id: disk_id.unwrap_or_default(),
            files: [(path.to_owned(), Node::default())].into(),
            live: path.to_owned(),
            content,
            tracking,
            writer: None,
            merge: None,
        };
        let key = self.number();
        self.disks.insert(key, disk);
        Ok(key)
    }

    /// The disk of a VM at the resource `suffix`; its key.
    pub(crate) fn disk_at(&self, vm: Uuid, suffix: &str) -> Option<u64> {
        let configuration = &self.vms.get(&vm)?.configuration;
        let (_, path) = configuration.disk_paths().find(|(found, _)| *found == suffix)?;
        self.disk_of(path)
    }

    /// The guest writes.
    pub(crate) fn write_disk(
        &mut self,
        key: u64,
        offset: u64,
        data: &[u8],
    ) -> vmtide_block::Result<()> {
        let local = self.own(&self.disks[&key].live.clone());
        let Some(disk) = self.disks.get_mut(&key) else { return Ok(()) };
        let writer = match &disk.writer {
            Some(writer) => writer.clone(),
            None => disk.writer.insert(images::write(&local)?).clone(),
        };
        writer.write_at(data, offset)?;
        disk.content.write(offset, data);
        let size_bytes = disk.content.size_bytes();
        disk.tracking.record(ByteRange::new(offset, data.len() as u64), size_bytes);
        Ok(())
    }

    /// Closes the file that the guest writes to, so that it can be read.
    pub(crate) fn close_writer(&mut self, key: u64) -> vmtide_block::Result<()> {
        let writer = self.disks.get_mut(&key).and_then(|disk| disk.writer.take());
        writer.map_or(Ok(()), |writer| writer.finish())
    }

    /// The image that a client writes to while the VM is off.
    pub(crate) fn offline_writer(
        &mut self,
        key: u64,
    ) -> vmtide_block::Result<Arc<dyn ImageWriter>> {
        self.close_writer(key)?;
        let local = self.own(&self.disks[&key].live.clone());
        let writer = images::write(&local)?;
        // Whoever writes past the host leaves tracking without knowledge of it.
        if !self.options.ids_survive_offline_writes {
            let mut random = self.random.clone();
            if let Some(disk) = self.disks.get_mut(&key) {
                disk.tracking.reset(&mut random);
            }
            self.random = random;
        }
        Ok(writer)
    }

    /// Takes note of what somebody has written into the file of a disk past the host.
    pub(crate) fn reread_disk(&mut self, key: u64) -> vmtide_block::Result<()> {
        self.close_writer(key)?;
        let device = images::open(&self.own(&self.disks[&key].live.clone()))?;
        let content = Content::of(&*device)?;
        let forgets = !self.options.ids_survive_offline_writes;
        let mut random = self.random.clone();
        if let Some(disk) = self.disks.get_mut(&key) {
            disk.content = content;
            if forgets {
                disk.tracking.reset(&mut random);
            }
        }
        self.random = random;
        Ok(())
    }

    /// Freezes a disk: what was written so far stays as it is, and a new file takes what comes.
    pub(crate) fn freeze_disk(
        &mut self,
        key: u64,
        enable_tracking: bool,
    ) -> vmtide_block::Result<FrozenDisk> {
        self.close_writer(key)?;
        let frozen_path = self.disks[&key].live.clone();
        let name = images::name_of(&frozen_path);
        let stem = name.split('_').next().unwrap_or(name);
        let stem = stem.rsplit_once('.').map_or(stem, |(stem, _)| stem).to_owned();
        let extension = match self.disks[&key].format {
            Format::Vhd => "avhd",
            _ => "avhdx",
        };
        let guid = crate::state::guid(self.random.guid());
        let live = format!(r"{}\{stem}_{guid}.{extension}", images::directory_of(&frozen_path));
        let writer = images::create_child(&self.own(&live), &self.own(&frozen_path))?;
        writer.finish()?;
        let disk = self.disks.get_mut(&key).expect("the disk is there");
        if enable_tracking && disk.format == Format::Vhdx {
            disk.tracking.enabled = true;
        }
        let sealed = disk.tracking.enabled.then(|| disk.tracking.seal());
        if let Some(node) = disk.files.get_mut(&frozen_path) {
            node.sealed = sealed;
        }
        let node = Node { parent: Some(frozen_path.clone()), sealed: None };
        disk.files.insert(live.clone(), node);
        disk.live.clone_from(&live);
        let (content, tracking) = (disk.content.clone(), disk.tracking.clone());
        Ok(FrozenDisk { disk: key, path: frozen_path, content, sealed, tracking })
    }

    /// Goes back to a frozen file: a new file over it takes what comes, the one written to is gone.
    pub(crate) fn revert_disk(&mut self, frozen: &FrozenDisk) -> vmtide_block::Result<String> {
        self.close_writer(frozen.disk)?;
        let old = self.disks[&frozen.disk].live.clone();
        let guid = crate::state::guid(self.random.guid());
        let stem = images::name_of(&frozen.path);
        let stem = stem.split(['_', '.']).next().unwrap_or(stem);
        let extension = old.rsplit('.').next().unwrap_or("avhdx").to_owned();
        let live = format!(r"{}\{stem}_{guid}.{extension}", images::directory_of(&frozen.path));
        images::create_child(&self.own(&live), &self.own(&frozen.path))?.finish()?;
        images::remove(&self.own(&old))?;
        let survive = self.options.ids_survive_revert;
        let mut random = self.random.clone();
        let disk = self.disks.get_mut(&frozen.disk).expect("the disk is there");
        disk.files.remove(&old);
        disk.files.insert(live.clone(), Node { parent: Some(frozen.path.clone()), sealed: None });
        disk.live.clone_from(&live);
        disk.merge = None;
        disk.content = frozen.content.clone();
        if survive {
            disk.tracking.go_back(&frozen.tracking);
        } else {
            disk.tracking.reset(&mut random);
        }
        self.random = random;
        Ok(live)
    }

    /// Lets merges go on: begins those that nothing stands against any more, and ends those whose time is
    /// over.
    pub(crate) fn merge_step(&mut self) {
        let keys: Vec<u64> = self.disks.keys().copied().collect();
        for key in keys {
            self.remove_branches(key);
            // One merge may make the next possible.
            for _ in 0..64 {
                if !self.merge_disk(key) {
                    break;
                }
            }
        }
    }

    /// Removes files that nothing leads to any more: the ends of branches whose checkpoint was removed after the VM had
    /// gone back to an earlier one.
    fn remove_branches(&mut self, key: u64) {
        loop {
            let Some(disk) = self.disks.get(&key).filter(|disk| disk.files.len() > 1) else {
                return;
            };
            let held = |path: &str| {
                let mut snapshots = self.snapshots.values();
                snapshots.any(|one| one.disks.values().any(|frozen| frozen.path == path))
            };
            let has_child =
                |path: &str| disk.files.values().any(|node| node.parent.as_deref() == Some(path));
            let is_end = |path: &&String| **path != disk.live && !has_child(path) && !held(path);
            let Some(end) = disk.files.keys().find(is_end).cloned() else { return };
            if self.is_open(&end) {
                return;
            }
            drop(images::remove(&self.own(&end)));
            if let Some(disk) = self.disks.get_mut(&key) {
                disk.files.remove(&end);
            }
            self.note(format!("removed {end}"));
        }
    }

    /// One step of one disk; whether a merge was done.
    fn merge_disk(&mut self, key: u64) -> bool {
        let Some((child, parent)) = self.mergeable(key) else {
            if let Some(disk) = self.disks.get_mut(&key) {
                disk.merge = None;
            }
            return false;
        };
        let merge_ms = self.faults.merge_ms.unwrap_or(self.options.merge_ms);
        let length = merge_ms * self.faults.slow_merge.max(1);
        let now_ms = self.now_ms;
        let disk = self.disks.get_mut(&key).expect("the disk is there");
        let due = match &disk.merge {
            Some((file, due)) if *file == child => *due,
            _ => {
                disk.merge = Some((child.clone(), now_ms + length));
                now_ms + length
            }
        };
        if now_ms < due || self.faults.merges_blocked {
            return false;
        }
        self.merge_now(key, &child, &parent)
            .unwrap_or_else(|error| panic!("merging {child} failed: {error}"));
        true
    }

    /// The file of a disk that can be merged into its parent next, and that parent.
    fn mergeable(&mut self, key: u64) -> Option<(String, String)> {
        let disk = self.disks.get(&key)?;
        let edges: Vec<(String, String)> = disk
            .files
            .iter()
            .filter_map(|(file, node)| Some((file.clone(), node.parent.clone()?)))
            .collect();
        let (live, single) = (disk.live.clone(), disk.files.len() == 1);
        if single {
            return None;
        }
        let blocked = self
            .vms
            .values()
            .any(|vm| vm.merges_off && vm.configuration.disk_paths().any(|(_, path)| path == live));
        if blocked {
            return None;
        }
        for (child, parent) in &edges {
            let held = |path: &str, recovery: bool| {
                let snapshots = self.snapshots.values().filter(|s| s.recovery || !recovery);
                snapshots.flat_map(|s| s.disks.values()).any(|frozen| frozen.path == path)
            };
            let children = edges.iter().filter(|(_, other)| other == parent).count();
            let is_free = children == 1 && !held(parent, false) && !held(child, true);
            if is_free && !self.is_open(parent) && !self.is_open(child) {
                return Some((child.clone(), parent.clone()));
            }
        }
        None
    }

    fn merge_now(&mut self, key: u64, child: &str, parent: &str) -> vmtide_block::Result<()> {
        self.close_writer(key)?;
        let disk = &self.disks[&key];
        let grandchildren: Vec<String> = disk
            .files
            .iter()
            .filter(|(_, node)| node.parent.as_deref() == Some(child))
            .map(|(file, _)| file.clone())
            .collect();
        let local: Vec<_> = grandchildren.iter().map(|file| self.own(file)).collect();
        images::merge(&self.own(child), &self.own(parent), &local)?;
        let disk = self.disks.get_mut(&key).expect("the disk is there");
        let merged = disk.files.remove(child).unwrap_or_default();
        if let Some(node) = disk.files.get_mut(parent) {
            node.sealed = merged.sealed;
        }
        for file in &grandchildren {
            if let Some(node) = disk.files.get_mut(file) {
                node.parent = Some(parent.to_owned());
            }
        }
        if disk.live == child {
            parent.clone_into(&mut disk.live);
        }
        disk.merge = None;
        self.rename_file(None, child, parent);
        self.note(format!("merged {child} into {parent}"));
        Ok(())
    }

    /// Whether files of a VM's disks are to be merged, now or later.
    pub(crate) fn is_merging(&self, vm: Uuid) -> bool {
        let Some(vm) = self.vms.get(&vm) else { return false };
        let mut paths = vm.configuration.disk_paths();
        paths.any(|(_, path)| {
            let disk = self.disk_of(path).and_then(|key| self.disks.get(&key));
            disk.is_some_and(|disk| disk.merge.is_some())
        })
    }

    /// Changes the size of a disk; the guest sees it at once.
    pub(crate) fn resize_disk(&mut self, key: u64, size_bytes: u64) -> vmtide_block::Result<()> {
        self.close_writer(key)?;
        let writer = images::write(&self.own(&self.disks[&key].live.clone()))?;
        writer.resize(size_bytes)?;
        writer.finish()?;
        let forgets = self.options.resize_loses_ids;
        let mut random = self.random.clone();
        if let Some(disk) = self.disks.get_mut(&key) {
            disk.content.resize(size_bytes);
            if forgets {
                disk.tracking.reset(&mut random);
            }
        }
        self.random = random;
        Ok(())
    }
}
