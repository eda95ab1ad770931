//! A repository, open.

use crate::backup::{BackupOptions, BackupSession};
use crate::care::{self, PruneOptions, PruneReport, VerifyOptions, VerifyReport};
use crate::config::{self, Encryption, RepositoryConfig};
use crate::context::{DISTANT_READERS, RepoContext};
use crate::crypto::MasterKey;
use crate::disk::PointDisk;
use crate::envelope::ObjectKind;
use crate::hold::Hold;
use crate::keys::{self, KdfParameters};
use crate::lease::{self, Lease, Purpose};
use crate::map::DiskMap;
use crate::password::Password;
use crate::point::{DiskRecord, Level, RestorePoint};
use crate::point_list::{self, PointCache, Reading};
use crate::store::ObjectStore;
use crate::{BLOCK_BYTES, ObjectId, RepoError, Result};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Serialize;
use std::sync::Arc;
use vmtide_block::{ByteRange, CancelToken, Progress, RangeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// How to make a repository.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The length of chunks on average, in bytes: a power of two from 16 KiB to 1 MiB.
    pub chunk_size_bytes: u32,
    /// Whether to encrypt.
    pub encryption: Encryption,
    /// What a password guess is to cost.
    pub kdf: KdfParameters,
    /// The name of the first key slot.
    pub key_label: String,
}

/// Smaller chunks find more that is equal and make the index larger; the figures are in
/// `docs/decisions/`.
const DEFAULT_CHUNK_SIZE_BYTES: u32 = 64 << 10;

impl Default for InitOptions {
    fn default() -> Self {
        Self {
            chunk_size_bytes: DEFAULT_CHUNK_SIZE_BYTES,
            encryption: Encryption::Aes256Gcm,
            kdf: KdfParameters::default(),
            key_label: "first".into(),
        }
    }
}

/// Whether there is any key slot, of this repository or another.
fn has_key_slots(store: &dyn ObjectStore) -> Result<bool> {
    let mut found = false;
    store.list("keys/", &mut |_| {
        found = true;
        Ok(())
    })?;
    Ok(found)
}

/// The restore points of a repository.
#[derive(Debug, Default)]
pub struct PointList {
    /// Those that can be read, oldest first.
    pub points: Vec<RestorePoint>,
    /// The objects that cannot, and why.
    pub unreadable: Vec<(String, RepoError)>,
    /// The holds in force.
    pub holds: Vec<Hold>,
    /// The holds that cannot be read, and why: they may be for any point.
    pub unreadable_holds: Vec<(String, RepoError)>,
    /// Those that do not count: their backup stood still, was taken for dead, and was not reported
    /// as done. Prune removes them.
    pub void: Vec<ObjectId>,
}

impl PointList {
    /// The first restore point that is lost: its object cannot be read, and no hold has its record.
    pub fn first_lost(&mut self) -> Option<(String, RepoError)> {
        let is_told = |name: &str| {
            self.points.iter().any(|point| ObjectKind::Point.object_name(point.id) == name)
        };
        let at = self.unreadable.iter().position(|(name, _)| !is_told(name))?;
        Some(self.unreadable.swap_remove(at))
    }
}

/// What a repository holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RepositoryStats {
    /// Restore points.
    pub points: u64,
    /// The sizes of all their disks, in bytes.
    pub virtual_bytes: u64,
    /// Packs.
    pub packs: u64,
    /// What the packs take, in bytes.
    pub pack_bytes: u64,
    /// What maps, index, restore points and forwards take, in bytes.
    pub metadata_bytes: u64,
}

/// An open repository. Shared by threads; clones share everything.
#[derive(Clone)]
pub struct Repository {
    pub(crate) context: Arc<RepoContext>,
    pub(crate) config: Arc<RepositoryConfig>,
    pub(crate) config_bytes: Arc<Vec<u8>>,
    pub(crate) master: MasterKey,
    /// The key slot it was opened with.
    pub(crate) slot: Option<ObjectId>,
    /// The key slots that a password was seen to open: that one, and those added since.
    pub(crate) opened: Arc<Mutex<Vec<ObjectId>>>,
}

impl Repository {
    /// Makes a repository in an empty store.
    ///
    /// # Errors
    /// [`RepoError::AlreadyExists`] where there is one; [`RepoError::Invalid`] for options that cannot
    /// be, such as encryption without a password; those of the store.
    pub fn init(
        store: Arc<dyn ObjectStore>,
        options: &InitOptions,
        password: Option<&Password>,
    ) -> Result<Self> {
        if store.open(config::OBJECT_NAME).is_ok() {
            return Err(RepoError::AlreadyExists {
                what: format!("a repository in {}", store.location()),
                hint: "use it, or choose another place".into(),
            });
        }
        let master = MasterKey::random()?;
        let config = RepositoryConfig::new(options.chunk_size_bytes, options.encryption, &master)?;
        let config_bytes = config.encode()?;
        let slot = match (options.encryption, password) {
            (Encryption::None, _) if has_key_slots(&*store)? => {
                return Err(RepoError::Invalid(format!(
                    "{} has key slots of an encrypted repository under keys/; remove them first",
                    store.location()
                )));
            }
            (Encryption::None, _) => None,
            (_, None) => {
                return Err(RepoError::Invalid("an encrypted repository needs a password".into()));
            }
            // The slot comes first: a crash here leaves a slot without a repository, which a
            // later `init` does not mind, and never a repository without a key.
            (_, Some(password)) => {
                let label = &options.key_label;
                let kdf = &options.kdf;
                let slot =
                    keys::create_slot(&*store, &config_bytes, &master, label, password, kdf)?;
                Some(slot.id)
            }
        };
        store.put(config::OBJECT_NAME, &config_bytes)?;
        Self::assemble(store, config, config_bytes, (master, slot))
    }

    /// Opens a repository. `password` is asked only where it is encrypted.
    ///
    /// # Errors
    /// [`RepoError::NotFound`] where there is none, [`RepoError::WrongPassword`],
    /// [`RepoError::Damaged`] or [`RepoError::Unsupported`] configuration; those of the store and of
    /// `password`.
    pub fn open(
        store: Arc<dyn ObjectStore>,
        password: &mut dyn FnMut() -> Result<Password>,
    ) -> Result<Self> {
        let config_bytes = config::read(&*store)?;
        let config = RepositoryConfig::decode(&config_bytes)?;
        let key = match config.master_key() {
            Some(_) if has_key_slots(&*store)? => {
                return Err(RepoError::damaged(
                    config::OBJECT_NAME,
                    "says that the repository is not encrypted, but it has key slots: somebody \
                     may have replaced it to get at new backups; nothing is read or written",
                ));
            }
            Some(master) => (master, None),
            None => {
                let (master, slot) = keys::unlock(&*store, &config_bytes, &password()?)?;
                (master, Some(slot))
            }
        };
        Self::assemble(store, config, config_bytes, key)
    }

    fn assemble(
        store: Arc<dyn ObjectStore>,
        config: RepositoryConfig,
        config_bytes: Vec<u8>,
        (master, slot): (MasterKey, Option<ObjectId>),
    ) -> Result<Self> {
        let context = RepoContext {
            store,
            subkeys: master.subkeys(),
            repository: config.id,
            chunk_size_bytes: config.chunk_size_bytes,
            sealed: config.encryption != Encryption::None,
            retention: None,
            damage: crate::context::DamageLog::default(),
            points: PointCache::default(),
        };
        Ok(Self {
            context: Arc::new(context),
            config: Arc::new(config),
            config_bytes: Arc::new(config_bytes),
            master,
            slot,
            opened: Arc::new(Mutex::new(slot.into_iter().collect())),
        })
    }

    /// What its parts work with.
    pub(crate) const fn context(&self) -> &Arc<RepoContext> {
        &self.context
    }

    /// The configuration.
    pub fn config(&self) -> &RepositoryConfig {
        &self.config
    }

    /// Where it is, for people.
    pub fn location(&self) -> String {
        self.context.store.location()
    }

    /// How many threads a job that reads much of it should have, where `for_disk` would do if it were on a disk of this machine:
    /// more where every read is a request over a network.
    pub fn readers(&self, for_disk: usize) -> usize {
        self.context.readers(for_disk, DISTANT_READERS)
    }

    /// Begins a lease: until it is dropped nothing is removed of the restore points that can be found
    /// from now on, whoever forgets them. A reader who cannot write goes on without one.
    ///
    /// # Errors
    /// Those of the store.
    pub fn lease(&self, purpose: Purpose) -> Result<Lease> {
        match purpose {
            Purpose::Read => Lease::begin_reading(&self.context, purpose),
            Purpose::Backup | Purpose::Prune => Lease::begin(&self.context, purpose),
        }
    }

    /// All restore points that count.
    ///
    /// # Errors
    /// Those of the store. A restore point that cannot be read is not an error here: it is listed.
    pub fn points(&self) -> Result<PointList> {
        point_list::load(&self.context, Reading::Fresh)
    }

    /// The restore point that `spec` names: an id or the beginning of one (at least 4 digits),
    /// `VM@latest` or only `VM` for its newest, `VM@TIME` for the newest at or before a time such as
    /// `2026-11-20T03:00` (local time, or with an offset) or `2026-11-20`.
    ///
    /// # Errors
    /// [`RepoError::NotFound`]; [`RepoError::Invalid`] where it fits several or is no such thing.
    pub fn resolve(&self, spec: &str) -> Result<RestorePoint> {
        crate::resolve::resolve(self.points()?, spec, &self.location())
    }

    /// The newest restore point of a VM.
    ///
    /// # Errors
    /// Those of [`points`](Self::points).
    pub fn latest(&self, vm: &str) -> Result<Option<RestorePoint>> {
        Ok(self.points()?.points.into_iter().rfind(|point| point.vm == vm))
    }

    /// The newest full restore point of a VM.
    ///
    /// # Errors
    /// Those of [`points`](Self::points).
    pub fn latest_full(&self, vm: &str) -> Result<Option<RestorePoint>> {
        let is_full = |point: &RestorePoint| point.vm == vm && point.level == Level::Full;
        Ok(self.points()?.points.into_iter().rfind(is_full))
    }

    /// A disk of a restore point, for reading. The caller holds a [`lease`](Self::lease).
    ///
    /// # Errors
    /// [`RepoError::NotFound`] for a disk it has not; [`RepoError::Damaged`]; those of the store.
    pub fn open_disk(&self, point: &RestorePoint, disk: &str) -> Result<Arc<PointDisk>> {
        let record = point.disk_record(disk).ok_or_else(|| {
            let ids: Vec<&str> = point.disks.iter().map(|disk| disk.id.as_str()).collect();
            RepoError::NotFound {
                what: format!("disk {disk:?} in restore point {}", point.id),
                hint: format!("it has {}", ids.join(", ")),
            }
        })?;
        let name = format!("{}@{}/{disk}", point.vm, point.id);
        Ok(Arc::new(PointDisk::open(&self.context, name, record)?))
    }

    /// Begins a backup.
    ///
    /// # Errors
    /// Those of the store.
    pub fn begin_backup(&self, options: &BackupOptions) -> Result<BackupSession> {
        let mut context = Arc::clone(&self.context);
        if let Some(immutability) = options.immutability {
            context = Arc::new(context.keeping(immutability.from(Timestamp::now())));
        }
        BackupSession::begin(context, options)
    }

    /// The bytes of the newer disk that may differ from the older, by their maps alone: nothing is
    /// read. Two blocks of equal content at different places count as different.
    ///
    /// # Errors
    /// [`RepoError::Damaged`]; those of the store.
    pub fn changed_between(&self, older: &DiskRecord, newer: &DiskRecord) -> Result<RangeSet> {
        let open = |record: &DiskRecord| {
            DiskMap::open(&self.context, &record.map, record.size_bytes.div_ceil(BLOCK))
        };
        let mut changed = RangeSet::new();
        DiskMap::diff(&open(older)?, &open(newer)?, &mut |blocks| {
            changed.insert(ByteRange::from_bounds(blocks.start * BLOCK, blocks.end * BLOCK));
            Ok(())
        })?;
        Ok(changed.clamp(newer.size_bytes))
    }

    /// Removes what no restore point needs, beside whatever else goes on in the repository.
    ///
    /// # Errors
    /// [`RepoError::Busy`] while another prune is at work; [`RepoError::Damaged`] where a restore
    /// point or what it names cannot be read, because what it needs is not known then; those of the
    /// store. Whatever was not removed is found by the next run.
    pub fn prune(
        &self,
        options: &PruneOptions,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<PruneReport> {
        care::prune(&self.context, options, progress, cancel)
    }

    /// Looks for damage.
    ///
    /// # Errors
    /// Those of the store other than damage, which is reported; [`RepoError::NotFound`] for a point that
    /// is not there.
    pub fn verify(
        &self,
        options: &VerifyOptions,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<VerifyReport> {
        let lease = self.lease(Purpose::Read)?;
        let mut list = self.points()?;
        list.unreadable.append(&mut list.unreadable_holds);
        if !options.points.is_empty() {
            for id in &options.points {
                let name = ObjectKind::Point.object_name(*id);
                let is_there = list.points.iter().any(|point| point.id == *id)
                    || list.unreadable.iter().any(|(unreadable, _)| *unreadable == name);
                if !is_there {
                    let what = format!("restore point {id}");
                    return Err(RepoError::NotFound { what, hint: String::new() });
                }
            }
            let wanted = |id: ObjectId| options.points.contains(&id);
            list.points.retain(|point| wanted(point.id));
            list.unreadable.retain(|(name, _)| {
                options.points.iter().any(|id| ObjectKind::Point.object_name(*id) == *name)
            });
        }
        let report =
            care::verify(&self.context, &list.points, &list.unreadable, options, progress, cancel)
                .map_err(|error| lease.explain(error))?;
        // What was removed because we were taken for dead is no damage.
        if !report.damage.is_empty() && lease.is_revoked()? {
            return Err(lease::stood_still());
        }
        Ok(report)
    }

    /// Counts what the repository holds.
    ///
    /// # Errors
    /// Those of the store.
    pub fn stats(&self) -> Result<RepositoryStats> {
        let points = self.points()?.points;
        let mut stats = RepositoryStats {
            points: points.len() as u64,
            virtual_bytes: points
                .iter()
                .flat_map(|point| &point.disks)
                .fold(0, |sum, disk| sum.saturating_add(disk.size_bytes)),
            ..RepositoryStats::default()
        };
        for kind in [
            ObjectKind::Pack,
            ObjectKind::MapSegment,
            ObjectKind::IndexSegment,
            ObjectKind::Point,
            ObjectKind::Forward,
        ] {
            self.context.store.list(kind.prefix(), &mut |entry| {
                if kind == ObjectKind::Pack {
                    stats.packs += 1;
                    stats.pack_bytes += entry.length_bytes;
                } else {
                    stats.metadata_bytes += entry.length_bytes;
                }
                Ok(())
            })?;
        }
        Ok(stats)
    }

    /// When it was made.
    pub fn created(&self) -> Timestamp {
        self.config.created
    }
}
