use super::*;
use crate::config::Encryption;
use crate::store::MemoryStore;
use proptest::prelude::*;
use serde_json::{Value, json};

const CHEAP: KdfParameters = KdfParameters { memory_kib: 64, iterations: 1, lanes: 1 };

fn master() -> MasterKey {
    MasterKey::from_bytes([0x5a; 32])
}

/// A store with a configuration and no slot.
fn repository() -> (MemoryStore, Vec<u8>) {
    let config = RepositoryConfig::new(65536, Encryption::Aes256Gcm, &master()).unwrap();
    let (store, bytes) = (MemoryStore::new(), config.encode().unwrap());
    store.put(config::OBJECT_NAME, &bytes).unwrap();
    (store, bytes)
}

fn add(store: &MemoryStore, config: &[u8], password: &str) -> ObjectId {
    let password = Password::new(password);
    create_slot(store, config, &master(), "label", &password, &CHEAP).unwrap().id
}

fn opens(store: &MemoryStore, config: &[u8], password: &str) -> Result<bool> {
    match unlock(store, config, &Password::new(password)) {
        Ok((key, _)) => {
            assert_eq!(key.as_bytes(), master().as_bytes());
            Ok(true)
        }
        Err(RepoError::WrongPassword { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Changes members of a stored slot, under a checksum that fits.
fn change(store: &MemoryStore, id: ObjectId, change: impl Fn(&mut Value)) {
    let name = object_name(id);
    let mut value: Value = serde_json::from_slice(&store.bytes(&name).unwrap()).unwrap();
    value.as_object_mut().unwrap().remove("checksum");
    change(&mut value);
    store.replace(&name, &document::encode(&value).unwrap());
}

#[test]
fn any_of_several_passwords_opens_and_no_other() {
    let (store, config) = repository();
    for password in ["one", "two", "drei ü", "\0"] {
        add(&store, &config, password);
    }
    for password in ["one", "two", "drei ü", "\0"] {
        assert!(opens(&store, &config, password).unwrap(), "{password}");
    }
    for password in ["", "One", "one ", "three"] {
        assert!(!opens(&store, &config, password).unwrap(), "{password}");
    }
    assert_eq!(list(&store).unwrap().keys.len(), 4);
}

#[test]
fn a_slot_shows_what_it_was_made_with_and_nothing_secret() {
    let (store, config) = repository();
    let made = create_slot(&store, &config, &master(), "office", &Password::new("hunter2"), &CHEAP)
        .unwrap();
    assert_eq!(list(&store).unwrap().keys, std::slice::from_ref(&made));
    assert_eq!((made.label.as_str(), made.kdf), ("office", CHEAP));
    let stored = store.bytes(&object_name(made.id)).unwrap();
    let stored = std::str::from_utf8(&stored).unwrap();
    assert!(!stored.contains("hunter2") && !stored.contains("5a5a5a"), "{stored}");
    let slots = read_slots(&store, repository_of(&store).unwrap()).unwrap();
    assert!(!format!("{:?}", slots.readable).contains("hunter2"));
}

#[test]
fn a_removed_password_opens_nothing_and_the_last_stays() {
    let (store, config) = repository();
    let first = add(&store, &config, "one");
    let error = remove(&store, first, &[first]).unwrap_err();
    assert!(matches!(error, RepoError::Invalid(_)), "{error}");
    let second = add(&store, &config, "two");
    let opened = [first, second];
    remove(&store, first, &opened).unwrap();
    assert!(!opens(&store, &config, "one").unwrap());
    assert!(opens(&store, &config, "two").unwrap());
    assert!(matches!(remove(&store, first, &opened), Err(RepoError::NotFound { .. })));
    assert!(matches!(remove(&store, second, &opened), Err(RepoError::Invalid(_))));
}

#[test]
fn what_cannot_be_a_slot_is_not_made() {
    let (store, config) = repository();
    let make = |label: &str, password: &str, kdf| {
        create_slot(&store, &config, &master(), label, &Password::new(password), &kdf)
    };
    let no_lanes = KdfParameters { lanes: 0, ..CHEAP };
    for made in [
        make("label", "", CHEAP),
        make("two\nlines", "x", CHEAP),
        make("\x1b[31m", "x", CHEAP),
        make(&"x".repeat(201), "x", CHEAP),
        make("label", "x", no_lanes),
    ] {
        assert!(matches!(made, Err(RepoError::Invalid(_))));
    }
    assert!(list(&store).unwrap().keys.is_empty());
}

#[test]
fn without_any_slot_it_is_not_the_password() {
    let (store, config) = repository();
    let error = opens(&store, &config, "one").unwrap_err();
    assert!(error.to_string().contains("no key slot is left"), "{error}");
}

#[test]
fn slots_of_a_repository_that_never_was_do_not_count() {
    let (store, config) = repository();
    let (_, other_config) = repository();
    let stray = add(&store, &other_config, "stray");
    let own = add(&store, &config, "one");
    assert_eq!(list(&store).unwrap().keys.len(), 1);
    assert!(!opens(&store, &config, "stray").unwrap());
    assert!(matches!(remove(&store, own, &[own, stray]), Err(RepoError::Invalid(_))));
    remove(&store, stray, &[own]).unwrap();
}

#[test]
fn a_slot_opens_only_with_the_configuration_it_was_made_for() {
    let (store, config) = repository();
    add(&store, &config, "one");
    let mut value: Value = serde_json::from_slice(&config).unwrap();
    value.as_object_mut().unwrap().remove("checksum");
    value["chunk_size_bytes"] = json!(16384);
    let changed = document::encode(&value).unwrap();
    assert!(!opens(&store, &changed, "one").unwrap());
}

#[test]
fn a_damaged_slot_is_damage_where_it_is_the_only_one_and_named_beside_others() {
    let (store, config) = repository();
    let id = add(&store, &config, "one");
    let good = store.bytes(&object_name(id)).unwrap();
    for bit in 0..good.len() * 8 {
        let mut flipped = good.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        store.replace(&object_name(id), &flipped);
        let error = opens(&store, &config, "one").unwrap_err();
        assert!(error.is_damage(), "bit {bit}: {error}");
        assert!(error.to_string().contains(&id.to_string()), "{error}");
    }
    let other = add(&store, &config, "two");
    assert!(opens(&store, &config, "two").unwrap());
    let error = unlock(&store, &config, &Password::new("one")).unwrap_err();
    assert!(matches!(error, RepoError::WrongPassword { .. }), "{error}");
    assert!(error.to_string().contains(&object_name(id)), "{error}");
    let listed = list(&store).unwrap();
    assert_eq!((listed.keys.len(), listed.unreadable.len()), (1, 1));
    assert!(listed.unreadable[0].0 == id && listed.unreadable[0].1.is_damage());
    assert!(matches!(remove(&store, other, &[id, other]), Err(RepoError::Invalid(_))));
    remove(&store, id, &[other]).unwrap();
    assert_eq!(list(&store).unwrap().keys.len(), 1);
}

#[test]
fn hostile_parameters_are_refused_at_once() {
    let (store, config) = repository();
    let id = add(&store, &config, "one");
    let original = store.bytes(&object_name(id)).unwrap();
    for (name, to) in [
        ("memory_kib", json!(u32::MAX)),
        ("memory_kib", json!((256 << 10) + 1)),
        ("memory_kib", json!(1)),
        ("memory_kib", json!(1_u64 << 40)),
        ("iterations", json!(65)),
        ("iterations", json!(0)),
        ("lanes", json!(17)),
        ("lanes", json!(0)),
        ("salt", json!("00")),
        ("more", json!(1)),
    ] {
        store.replace(&object_name(id), &original);
        change(&store, id, |value| value["kdf"][name] = to.clone());
        let error = opens(&store, &config, "one").unwrap_err();
        assert!(error.is_damage(), "{name} {to}: {error}");
    }
    for (name, to) in [("algorithm", json!("scrypt")), ("version", json!(16))] {
        store.replace(&object_name(id), &original);
        change(&store, id, |value| value["kdf"][name] = to.clone());
        let error = opens(&store, &config, "one").unwrap_err();
        assert!(matches!(error, RepoError::Unsupported { .. }), "{error}");
    }
    for (name, to) in [
        ("id", json!("0".repeat(32))),
        ("label", json!("a\u{7}b")),
        ("label", json!("x".repeat(5000))),
        ("sealed_master_key", json!("00".repeat(47))),
        ("sealed_master_key", json!(null)),
        ("created", json!(0)),
        ("format", json!("vmtide repository")),
        ("more", json!(1)),
    ] {
        store.replace(&object_name(id), &original);
        change(&store, id, |value| value[name] = to.clone());
        let error = opens(&store, &config, "one").unwrap_err();
        assert!(error.is_damage(), "{name}: {error}");
    }
}

#[test]
fn more_slots_than_are_read_keep_nobody_out_and_are_not_made() {
    let (store, config) = repository();
    let first = add(&store, &config, "one");
    for n in 0..MAX_SLOTS - 1 {
        std::thread::sleep(std::time::Duration::from_millis(1));
        store.replace(&format!("keys/{n:032x}"), b"");
    }
    let full = || create_slot(&store, &config, &master(), "", &Password::new("two"), &CHEAP);
    let error = full().unwrap_err();
    assert!(matches!(error, RepoError::Invalid(_)), "{error}");
    store.replace("keys/0000000000000000ffffffffffffffff", b"");
    assert!(opens(&store, &config, "one").unwrap(), "the oldest are read");
    assert!(matches!(full(), Err(RepoError::Invalid(_))));
    let KeyList { keys, unreadable } = list(&store).unwrap();
    assert_eq!((keys.len(), unreadable.len()), (1, MAX_SLOTS));
    for (id, _) in unreadable {
        remove(&store, id, &[first]).unwrap();
    }
    assert!(full().is_ok());
}

#[test]
fn a_recovery_key_given_as_a_chosen_password_opens_however_it_is_written() {
    let (store, config) = repository();
    let key = RecoveryKey::random().unwrap();
    let (small, bare) = (key.text().to_lowercase(), key.text().replace('-', ""));
    for written in [key.text(), &small, &bare, &format!(" {small}\n")] {
        let id = add(&store, &config, written);
        for typed in [key.text(), &small, &bare] {
            assert!(opens(&store, &config, typed).unwrap(), "{written:?} as {typed:?}");
        }
        remove(&store, id, &[add(&store, &config, "other")]).unwrap();
    }
}

#[test]
fn a_slot_that_opens_with_nothing_does_not_count_as_one_that_is_left() {
    let (store, config) = repository();
    let own = add(&store, &config, "one");
    let junk = add(&store, &config, "junk");
    change(&store, junk, |value| value["sealed_master_key"] = json!("00".repeat(48)));
    let error = remove(&store, own, &[own]).unwrap_err();
    assert!(error.to_string().contains("key rotate"), "{error}");
    assert!(opens(&store, &config, "one").unwrap());
    remove(&store, junk, &[own]).unwrap();
}

/// Says that what is not there may be removed, as a directory does that can only be added to, and denies
/// the rest.
#[derive(Clone)]
struct AppendOnly(MemoryStore);

impl ObjectStore for AppendOnly {
    fn location(&self) -> String {
        self.0.location()
    }
    fn create(&self, name: &str) -> Result<Box<dyn crate::store::ObjectWriter>> {
        self.0.create(name)
    }
    fn open(&self, name: &str) -> Result<Box<dyn crate::store::ObjectReader>> {
        self.0.open(name)
    }
    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(crate::store::ObjectEntry) -> Result<()>,
    ) -> Result<()> {
        self.0.list(prefix, visit)
    }
    fn remove(&self, name: &str) -> Result<()> {
        match self.0.bytes(name) {
            None => Ok(()),
            Some(_) => Err(RepoError::io(
                "remove",
                std::io::Error::from(std::io::ErrorKind::PermissionDenied),
            )),
        }
    }
    fn remove_unfinished(&self) -> Result<u64> {
        self.0.remove_unfinished()
    }
}

#[test]
fn a_removal_that_is_denied_late_announces_nothing() {
    let (store, config) = repository();
    let (first, second) = (add(&store, &config, "one"), add(&store, &config, "two"));
    let opened = [first, second];
    let error = remove(&AppendOnly(store.clone()), first, &opened).unwrap_err();
    assert!(matches!(error, RepoError::Denied { .. }), "{error}");
    remove(&store, second, &opened).unwrap();
    assert!(opens(&store, &config, "one").unwrap());
}

#[test]
fn what_is_no_slot_by_name_is_left_alone() {
    let (store, config) = repository();
    add(&store, &config, "one");
    store.replace("keys/README", b"text");
    assert!(opens(&store, &config, "one").unwrap());
    assert_eq!(list(&store).unwrap().keys.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is changed in a slot's sealed parts, under a checksum that fits: it does not open,
    /// and no other key comes out.
    #[test]
    fn a_forged_slot_does_not_open(at in 0_usize..96, salt in any::<bool>(), digit in 1_u8..16) {
        let (store, config) = repository();
        let id = add(&store, &config, "one");
        change(&store, id, |value| {
            let (field, at) = if salt {
                (&mut value["kdf"]["salt"], at % 32)
            } else {
                (&mut value["sealed_master_key"], at)
            };
            let mut digits: Vec<char> = field.as_str().unwrap().chars().collect();
            let old = digits[at].to_digit(16).unwrap();
            digits[at] = char::from_digit(old ^ u32::from(digit), 16).unwrap();
            *field = digits.into_iter().collect::<String>().into();
        });
        prop_assert!(!opens(&store, &config, "one").unwrap());
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Slot::decode(ObjectId([0; 16]), &bytes).is_err());
        prop_assert!(RepositoryConfig::decode(&bytes).is_err());
    }
}
