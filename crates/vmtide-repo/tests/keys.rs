//! Passwords are added, changed and removed; whatever crashes and whoever does it at the same
//! moment, a password that was told to work does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::{PASSWORD, init_options, repository};
use std::sync::{Arc, Barrier};
use vmtide_repo::{
    DenyStore, FaultyStore, KdfParameters, MemoryStore, ObjectId, ObjectStore, Password, RepoError,
    Repository,
};

fn open(store: &Arc<dyn ObjectStore>, password: &str) -> Result<Repository, RepoError> {
    Repository::open(Arc::clone(store), &mut || Ok(Password::new(password)))
}

fn kdf() -> KdfParameters {
    init_options(true).kdf
}

fn slot(repository: &Repository) -> ObjectId {
    repository.opened_with().unwrap()
}

#[test]
fn a_password_is_changed_at_every_step_or_not() {
    let base = MemoryStore::new();
    repository(&(Arc::new(base.clone()) as Arc<dyn ObjectStore>), true);
    for step in 0.. {
        let copy: Arc<dyn ObjectStore> = Arc::new(base.snapshot());
        let faulty: Arc<dyn ObjectStore> = Arc::new(FaultyStore::crashing_at(copy.clone(), step));
        let rotated = open(&faulty, PASSWORD).and_then(|repository| {
            repository.rotate_key(slot(&repository), "new", &Password::new("two"), &kdf())
        });
        match &rotated {
            Err(_) => drop(open(&copy, PASSWORD).expect("the old password still opens")),
            // Told to be in force, whatever became of the old one.
            Ok(_) => drop(open(&copy, "two").expect("the new password opens")),
        }
        // The next run needs no repair.
        let works = if open(&copy, "two").is_ok() { "two" } else { PASSWORD };
        let repository = open(&copy, works).unwrap();
        let again = repository.rotate_key(slot(&repository), "", &Password::new("three"), &kdf());
        assert!(again.unwrap().old_left.is_none(), "step {step}");
        for key in open(&copy, "three").unwrap().keys().unwrap().keys {
            if Some(key.id) != open(&copy, "three").unwrap().opened_with() {
                repository.remove_key(key.id).unwrap();
            }
        }
        assert!(matches!(open(&copy, PASSWORD), Err(RepoError::WrongPassword { .. })));
        assert!(matches!(open(&copy, "two"), Err(RepoError::WrongPassword { .. })));
        let repository = open(&copy, "three").unwrap();
        let last = repository.remove_key(slot(&repository)).unwrap_err();
        assert!(matches!(last, RepoError::Invalid(_)), "{last}");
        if rotated.is_ok_and(|rotated| rotated.old_left.is_none()) {
            assert!(step >= 3, "only {step} changes of the store were tried");
            return;
        }
    }
}

#[test]
fn removing_a_key_may_die_anywhere() {
    let base = MemoryStore::new();
    let first = repository(&(Arc::new(base.clone()) as Arc<dyn ObjectStore>), true);
    let second = first.add_key("second", &Password::new("two"), &kdf()).unwrap().id;
    for step in 0.. {
        let copy: Arc<dyn ObjectStore> = Arc::new(base.snapshot());
        let faulty: Arc<dyn ObjectStore> = Arc::new(FaultyStore::crashing_at(copy.clone(), step));
        let done = open(&faulty, PASSWORD).and_then(|it| it.remove_key(second)).is_ok();
        let after = open(&copy, PASSWORD).unwrap();
        match after.remove_key(second) {
            Ok(()) => assert!(!done),
            Err(error) => assert!(matches!(error, RepoError::NotFound { .. }), "{error}"),
        }
        let last = after.remove_key(slot(&after)).unwrap_err();
        assert!(matches!(last, RepoError::Invalid(_)), "{last}");
        after.add_key("third", &Password::new("three"), &kdf()).unwrap();
        after.remove_key(slot(&after)).unwrap();
        drop(open(&copy, "three").unwrap());
        if done {
            assert!(step >= 2, "only {step} changes of the store were tried");
            return;
        }
    }
}

#[test]
fn two_that_remove_the_last_two_keys_at_once_leave_one() {
    for _ in 0..50 {
        let memory = MemoryStore::new();
        let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
        let repository = repository(&store, true);
        let second = repository.add_key("second", &Password::new("two"), &kdf()).unwrap().id;
        let first = slot(&repository);
        let barrier = Barrier::new(2);
        let removed = std::thread::scope(|scope| {
            let handles = [first, second].map(|id| {
                let (repository, barrier) = (&repository, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    repository.remove_key(id).is_ok()
                })
            });
            handles.map(|handle| handle.join().unwrap())
        });
        assert_ne!(removed, [true, true]);
        let left = repository.keys().unwrap().keys.len();
        assert_eq!(left, 2 - removed.iter().filter(|done| **done).count());
        let names = memory.names();
        assert!(!names.iter().any(|name| name.starts_with("removing/")), "{names:?}");
    }
}

#[test]
fn a_recovery_key_opens_the_repository_and_mistakes_in_it_are_named() {
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    let repository = repository(&store, true);
    let (slot, key) = repository.add_recovery_key("paper", &kdf()).unwrap();
    for text in [key.text().to_owned(), key.text().to_lowercase().replace('-', " ")] {
        assert_eq!(open(&store, &text).unwrap().opened_with(), Some(slot.id));
    }
    let mut mistyped = key.text().to_owned();
    let third = mistyped.split_off(12);
    let other = if third.starts_with('7') { '8' } else { '7' };
    mistyped.push(other);
    mistyped.push_str(&third[1..]);
    let error = open(&store, &mistyped).map(drop).unwrap_err();
    assert!(matches!(error, RepoError::WrongPassword { .. }), "{error}");
    assert!(error.to_string().contains("mistyped in group 3"), "{error}");
    assert!(!error.to_string().contains(&mistyped), "{error}");
    let error = open(&store, "other").map(drop).unwrap_err();
    assert!(!error.to_string().contains("mistyped"), "{error}");
    repository.remove_key(slot.id).unwrap();
    assert!(open(&store, key.text()).is_err());
}

#[test]
fn a_credential_that_may_not_remove_changes_a_password_and_says_what_is_left() {
    let full: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    repository(&full, true);
    let deny: Arc<dyn ObjectStore> = Arc::new(DenyStore::new(Arc::clone(&full)));
    let writer = open(&deny, PASSWORD).unwrap();
    let old = slot(&writer);
    let rotated = writer.rotate_key(old, "", &Password::new("two"), &kdf()).unwrap();
    let error = rotated.old_left.unwrap();
    assert!(matches!(error, RepoError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("may not remove"), "{error}");
    drop(open(&full, PASSWORD).unwrap());
    // Nothing is left that would keep one who may from removing any of the two.
    let admin = open(&full, "two").unwrap();
    admin.remove_key(old).unwrap();
    assert_eq!(admin.keys().unwrap().keys.len(), 1);
    let error = admin.rotate_key(old, "", &Password::new("x"), &kdf()).unwrap_err();
    assert!(matches!(error, RepoError::NotFound { .. }), "{error}");
}
