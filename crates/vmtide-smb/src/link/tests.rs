//! Connections to servers that no real one is on demand.

use super::standin::{AMPLE, connected};
use super::*;
use std::sync::atomic::AtomicBool;

/// The time of a request where the server does not answer: no stall of the machine changes what comes then.
const SHORT: Duration = Duration::from_millis(700);

const FLUSH: Request<'static> =
    Request { command: Command::Flush, tree_id: 1, body: &[24, 0], data: &[], payload_bytes: 0 };

fn flush(link: &Link) -> Result<Reply> {
    link.call(&FLUSH)
}

/// What a server in an encrypted session answers to a flush, the link after it, and whether it was broken.
fn after(code: u32, is_plain: bool) -> (Result<Reply>, Link, bool) {
    let (link, server) = connected(true, AMPLE, move |server| {
        let asked = server.next();
        server.say(&asked, code, 0, &[9, 0], is_plain);
    });
    let answer = flush(&link);
    // It would be broken by its end, too.
    let is_broken = link.is_broken();
    server.join().unwrap();
    (answer, link, is_broken)
}

/// Whoever comes next gets another session, also where the answer itself was encrypted.
#[test]
fn a_session_that_has_ended_is_not_used_again() {
    for (code, is_plain, words) in [
        (status::USER_SESSION_DELETED, false, "ended the session"),
        (status::USER_SESSION_DELETED, true, "ended the session"),
        (status::NETWORK_SESSION_EXPIRED, true, "ticket has expired"),
    ] {
        let (answer, _, is_broken) = after(code, is_plain);
        let error = answer.err().unwrap();
        assert!(error.is_connection_lost() && error.to_string().contains(words), "{error}");
        assert!(is_broken, "{code:#x}");
    }
}

/// The connection stays, for a new ticket.
#[test]
fn a_session_whose_ticket_has_expired_waits_for_another() {
    let (answer, link, is_broken) = after(status::NETWORK_SESSION_EXPIRED, false);
    assert_eq!(answer.unwrap().header.status, status::NETWORK_SESSION_EXPIRED);
    assert!(link.is_expired() && !is_broken);
    link.renewed();
    assert!(!link.is_expired() && link.renewals() == 1);
    link.end("no other ticket was taken");
    assert!(link.is_broken());
}

/// Whoever hears late that the old ticket had expired does not have a good session renewed.
#[test]
fn what_was_refused_before_a_renewal_asks_for_no_other() {
    let (told, renewed) = sync_channel(1);
    let (link, server) = connected(true, AMPLE, move |server| {
        let early = [server.next(), server.next()];
        renewed.recv().unwrap();
        for asked in early {
            server.answer(&asked, status::NETWORK_SESSION_EXPIRED, &[9, 0]);
        }
        let late = server.next();
        server.answer(&late, status::NETWORK_SESSION_EXPIRED, &[9, 0]);
    });
    link.shared.state.lock().credits = 8;
    let early = [(); 2].map(|()| link.send(&FLUSH).unwrap());
    let held = link.hold();
    link.renewed();
    drop(held);
    told.send(()).unwrap();
    for ticket in early {
        assert_eq!(link.wait(ticket).unwrap().header.status, status::NETWORK_SESSION_EXPIRED);
        assert!(!link.is_expired() && link.has_expired_since(0) && !link.has_expired_since(1));
    }
    // The new one ends as the old one did.
    flush(&link).unwrap();
    assert!(link.is_expired() && link.has_expired_since(1));
    server.join().unwrap();
}

/// A server refuses whatever comes between the messages of a login.
#[test]
fn nothing_but_the_login_is_sent_while_a_session_is_renewed() {
    let (link, server) = connected(true, AMPLE, |server| {
        [(); 3].map(|()| {
            let asked = server.next();
            server.answer(&asked, status::SUCCESS, &[4, 0, 0, 0]);
            asked.command
        })
    });
    let held = link.hold();
    let answered = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            flush(&link).unwrap();
            answered.store(true, Ordering::Release);
        });
        // So that it would be the first if it could. There is one credit, which it must not take and keep.
        std::thread::sleep(Duration::from_millis(200));
        // Nor does it keep from asking whether the server lives.
        link.call(&Request { command: Command::Echo, ..FLUSH }).unwrap();
        link.call(&Request { command: Command::SessionSetup, ..FLUSH }).unwrap();
        assert!(!answered.load(Ordering::Acquire));
        drop(held);
    });
    let (_, commands) = server.join().unwrap();
    assert_eq!(
        commands,
        [Command::Echo, Command::SessionSetup, Command::Flush].map(|command| command as u16)
    );
}

/// The answer is taken out of those that wait before it is handed over: a request whose time passes in between has
/// succeeded.
#[test]
fn an_answer_that_is_handed_over_has_come() {
    let (link, server) = connected(true, SHORT, |server| drop(server.next()));
    let ticket = link.send(&FLUSH).unwrap();
    let _open = server.join().unwrap();
    let waiting = link.shared.state.lock().waiting.remove(&ticket.message_id).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn({
            let link = &link;
            move || link.answer(&ticket, false)
        });
        // Somebody stops the receiver there for longer than the time of the request.
        std::thread::sleep(SHORT * 2);
        let frame = vec![0; HEADER_BYTES];
        let header = ResponseHeader {
            status: 0,
            credits: 0,
            flags: 0,
            message_id: 0,
            session_id: 0,
            tree_id: 0,
        };
        let reply = Reply { frame, start: 0, header, is_encrypted: true };
        assert!(waiting.answer.try_send(Ok(reply)).is_ok());
        assert!(waits.join().unwrap().unwrap().is_some());
    });
    assert!(!link.is_broken());
}

#[test]
fn what_the_server_is_at_is_waited_for_while_it_lives() {
    let (link, server) = connected(true, Duration::from_secs(3), |server| {
        let asked = server.next();
        server.say_that_it_is_at_it(&asked);
        for _ in 0..2 {
            let alive = server.next();
            assert_eq!(alive.command, Command::Echo as u16);
            server.answer(&alive, status::SUCCESS, &[4, 0, 0, 0]);
        }
        server.answer(&asked, status::SUCCESS, &[4, 0, 0, 0]);
    });
    assert_eq!(flush(&link).unwrap().header.status, status::SUCCESS);
    assert!(!link.is_broken());
    server.join().unwrap();
}

#[test]
fn a_server_that_falls_silent_is_given_up() {
    for says in [true, false] {
        let (link, server) = connected(true, SHORT, move |server| {
            let asked = server.next();
            if says {
                server.say_that_it_is_at_it(&asked);
            }
            // Until the client has had enough.
            drop(server.stream.read_to_end(&mut Vec::new()));
        });
        let error = flush(&link).err().unwrap();
        assert!(matches!(error, SmbError::Timeout { .. }), "{says}: {error}");
        assert!(link.is_broken());
        server.join().unwrap();
    }
}

#[test]
fn nobody_else_says_that_the_server_is_at_it() {
    let (link, server) = connected(true, AMPLE, |server| {
        let asked = server.next();
        server.say(&asked, status::PENDING, FLAG_ASYNC, &[9, 0], true);
    });
    let error = flush(&link).err().unwrap();
    assert!(matches!(error, SmbError::Protocol { .. }), "{error}");
    server.join().unwrap();
}

#[test]
fn an_answer_is_no_larger_than_its_credits() {
    let of = |length: usize| {
        let (link, server) = connected(false, AMPLE, move |server| {
            let asked = server.next();
            server.answer(&asked, status::SUCCESS, &vec![0; length]);
        });
        let answer = flush(&link);
        let _open = server.join().unwrap();
        (answer, link.is_broken())
    };
    let (answer, is_broken) = of(64 << 10);
    assert!(answer.is_ok() && !is_broken);
    let (answer, is_broken) = of(1 << 20);
    assert!(matches!(answer, Err(SmbError::Protocol { .. })) && is_broken);
}

#[test]
fn large_buffers_are_not_kept() {
    let (link, server) = connected(false, AMPLE, |_| {});
    server.join().unwrap();
    for length in [4096, MAX_SPARE_BYTES + 1] {
        let frame = vec![0; length];
        let header = ResponseHeader {
            status: 0,
            credits: 0,
            flags: 0,
            message_id: 0,
            session_id: 0,
            tree_id: 0,
        };
        link.recycle(Reply { frame, start: 0, header, is_encrypted: false });
    }
    assert_eq!(link.shared.spare.lock().len(), 1);
}

/// A server that takes a little now and then holds nobody for ever: the whole message has one time.
#[test]
fn a_message_that_is_taken_too_slowly_ends_the_connection() {
    // It has megabytes to read when the test is over: nobody waits for it.
    let (link, _) = connected(false, SHORT, |server| {
        let mut little = [0; 16 << 10];
        while matches!(server.stream.read(&mut little), Ok(1..)) {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    // At this pace it would take more than a minute.
    let error = link.shared.write(&vec![0; 64 << 20]).unwrap_err();
    assert!(matches!(error, SmbError::Timeout { .. }), "{error}");
    // Who comes meanwhile does not wait for longer either.
    let _held = link.shared.sending.lock();
    let error = link.shared.write(b"x").unwrap_err();
    assert!(matches!(error, SmbError::Timeout { .. }), "{error}");
}
