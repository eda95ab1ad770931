//! A client of QEMU's machine protocol (QMP).
//!
//! One JSON object per line: a greeting, `qmp_capabilities`, then commands with an `id` that the
//! answer repeats, and events in between (QEMU, `docs/interop/qmp-spec`). The monitor serves one
//! client at a time: a second connection waits in the listener's queue, which shows here as a
//! missing greeting. What QEMU had still to say to a client that died, it says to the next one:
//! the rest of a line, answers and events, before the greeting or right after it. Ids are therefore
//! random for each connection, so that no answer to another client is ever taken for one of ours,
//! and what comes before the greeting is passed over. The client is shared by threads; commands run
//! one after another.

use crate::channel::{Address, ChannelError, LineChannel};
use crate::process::identity_of;
use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmtide_hypervisor::{HypervisorError, JobId};

/// How long a command that only looks may take. QEMU answers in microseconds unless its main
/// loop is stuck behind slow storage.
pub const QUERY_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a command that changes the block graph may take: it waits for all requests in flight
/// of the disks it touches.
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Events kept for who asks later; older ones are dropped.
const MAX_EVENTS: usize = 256;

/// The most lines meant for an earlier client that are passed over, before the greeting and for one
/// command. QEMU keeps what one client did not read, which is at most a few answers and the events
/// since; a peer that sends more is none.
const MAX_STALE_LINES: usize = 4096;

/// Why a monitor command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be connected to.
    #[error("cannot connect to the QEMU monitor {address}: {source}")]
    Connect {
        /// The socket.
        address: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The connection was closed, most often because QEMU ended.
    #[error(
        "QEMU monitor {address}: connection lost during {command}: QEMU has ended or closed it"
    )]
    Closed {
        /// The socket.
        address: String,
        /// What was under way.
        command: String,
    },
    /// No answer in time.
    #[error("QEMU monitor {address} did not answer {command} within {timeout_ms} ms")]
    Timeout {
        /// The socket.
        address: String,
        /// What was under way.
        command: String,
        /// How long was waited, in milliseconds.
        timeout_ms: u64,
    },
    /// What came is not QMP.
    #[error("QEMU monitor {address} does not speak QMP: {detail}")]
    Protocol {
        /// The socket.
        address: String,
        /// What came.
        detail: String,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, e.g. `GenericError`, `CommandNotFound`, `DeviceNotFound`.
        class: String,
        /// QEMU's text.
        description: String,
    },
}

impl QmpError {
    /// Whether QEMU itself is gone or cannot be talked to any more, as opposed to a refusal.
    pub fn is_connection(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

impl From<QmpError> for HypervisorError {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Connect { address, source } => match source.kind() {
                std::io::ErrorKind::NotFound => Self::NotFound {
                    what: format!("QEMU monitor socket {address}"),
                    detail: "start the VM with `-qmp unix:PATH,server=on,wait=off`, or back up its image file when it is powered off".into(),
                },
                std::io::ErrorKind::PermissionDenied => Self::Denied {
                    what: format!("connect to the QEMU monitor {address}"),
                    detail: "run as root or as the user QEMU runs as".into(),
                },
                _ => Self::Unreachable {
                    peer: format!("QEMU monitor {address}"),
                    detail: format!("{source}; is the VM running?"),
                },
            },
            QmpError::Closed { address, command } => Self::Unreachable {
                peer: format!("QEMU monitor {address}"),
                detail: format!("connection lost during {command}: QEMU has ended or closed it"),
            },
            QmpError::Timeout {
                address,
                command,
                timeout_ms,
            } => Self::Timeout {
                action: format!("{command} on the QEMU monitor {address}"),
                timeout_ms,
            },
            QmpError::Protocol { address, detail } => {
                Self::protocol(format!("QEMU monitor {address}"), detail)
            }
            QmpError::Refused {
                command,
                description,
                ..
            } => Self::failed(format!("QEMU command {command}"), description),
        }
    }
}

/// QEMU's version as the greeting says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// Micro number.
    pub micro: u64,
}

impl QemuVersion {
    /// Whether this is at least `major.minor`.
    pub const fn at_least(self, major: u64, minor: u64) -> bool {
        self.major > major || (self.major == major && self.minor >= minor)
    }
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

struct Connection {
    channel: LineChannel,
    /// What the ids of this connection begin with.
    id_prefix: String,
    next_id: u64,
    events: VecDeque<Value>,
    broken: bool,
}

/// A connected monitor.
pub struct QmpClient {
    address: Address,
    version: QemuVersion,
    owner: Option<(u32, u32)>,
    process: Option<String>,
    connection: Mutex<Connection>,
}

impl QmpClient {
    /// Connects, reads the greeting and switches the monitor to command mode, all within
    /// `timeout`.
    ///
    /// # Errors
    /// [`QmpError::Connect`]; [`QmpError::Timeout`] where no greeting comes, which most often
    /// means that another program holds this monitor; [`QmpError::Protocol`].
    pub fn connect(address: &Address, timeout: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + timeout;
        let mut channel = LineChannel::connect(address, deadline).map_err(|error| match error {
            ChannelError::Io(source) => QmpError::Connect { address: address.to_string(), source },
            other => busy_or(address, timeout, other),
        })?;
        let version = greeting(address, &mut channel, deadline, timeout)?;
        let peer = channel.unix_fd().and_then(|fd| socket_peercred(fd).ok());
        let owner = peer.map(|peer| (peer.uid.as_raw(), peer.gid.as_raw()));
        let process = peer.and_then(|peer| identity_of(peer.pid));
        let client = Self {
            address: address.clone(),
            version,
            owner,
            process,
            connection: Mutex::new(Connection {
                channel,
                id_prefix: format!("vmtide-{}-", JobId::random()),
                next_id: 1,
                events: VecDeque::new(),
                broken: false,
            }),
        };
        client.execute_within("qmp_capabilities", json!({}), timeout)?;
        Ok(client)
    }

    /// The socket.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// QEMU's version.
    pub fn version(&self) -> QemuVersion {
        self.version
    }

    /// User and group QEMU listens as; none over TCP.
    pub fn owner(&self) -> Option<(u32, u32)> {
        self.owner
    }

    /// Tells this QEMU process from any other that listens or listened at this address; none over
    /// TCP, or where the kernel does not tell.
    pub(crate) fn process(&self) -> Option<&str> {
        self.process.as_deref()
    }

    /// Runs a command that only looks, within [`QUERY_TIMEOUT`].
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn query(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, QUERY_TIMEOUT)
    }

    /// Runs a command that changes something, within [`CHANGE_TIMEOUT`].
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, CHANGE_TIMEOUT)
    }

    /// Runs a command and waits for its answer. After a [`QmpError::Timeout`] the client stays
    /// usable: a late answer is recognised by its id and thrown away.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + timeout;
        let mut connection = self.lock();
        if connection.broken {
            return Err(self.closed(command));
        }
        let id = format!("{}{}", connection.id_prefix, connection.next_id);
        connection.next_id += 1;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        tracing::trace!(command, %line, "qmp");
        line.push('\n');
        let answer = connection
            .channel
            .send(line.as_bytes(), deadline)
            .map_err(|error| self.channel_error(command, timeout, error))
            .and_then(|()| self.answer_to(&mut connection, &id, command, deadline, timeout));
        if let Err(QmpError::Closed { .. } | QmpError::Protocol { .. }) = &answer {
            connection.broken = true;
        }
        answer
    }

    /// Takes the events seen so far, oldest first.
    pub fn take_events(&self) -> Vec<Value> {
        self.lock().events.drain(..).collect()
    }

    fn answer_to(
        &self,
        connection: &mut Connection,
        id: &str,
        command: &str,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let mut stale = 0;
        while stale < MAX_STALE_LINES {
            let line = connection
                .channel
                .read_line(deadline)
                .map_err(|error| self.channel_error(command, timeout, error))?;
            let mut message = parse(&self.address, &line)?;
            if message.get("event").is_some() {
                if connection.events.len() == MAX_EVENTS {
                    connection.events.pop_front();
                }
                connection.events.push_back(message);
                continue;
            }
            let answered = message.get("id");
            if let Some(error) = message.get("error") {
                // An error without an id answers a line QEMU could not parse: that was ours.
                if answered.is_none_or(|answered| answered == id) {
                    return Err(refused(command, error));
                }
                stale += 1;
                continue;
            }
            return match (answered, message.get("return")) {
                (Some(answered), Some(_)) if answered != id => {
                    stale += 1;
                    continue;
                }
                (Some(_), Some(_)) => Ok(message["return"].take()),
                _ => Err(self.protocol(&message)),
            };
        }
        Err(QmpError::Protocol {
            address: self.address.to_string(),
            detail: format!("{stale} answers came, but none to {command}"),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn protocol(&self, message: &Value) -> QmpError {
        QmpError::Protocol {
            address: self.address.to_string(),
            detail: format!("it sent {}", shorten(&message.to_string())),
        }
    }

    fn closed(&self, command: &str) -> QmpError {
        QmpError::Closed { address: self.address.to_string(), command: command.into() }
    }

    fn channel_error(&self, command: &str, timeout: Duration, error: ChannelError) -> QmpError {
        match error {
            ChannelError::Timeout => QmpError::Timeout {
                address: self.address.to_string(),
                command: command.into(),
                timeout_ms: milliseconds(timeout),
            },
            ChannelError::LineTooLong => {
                QmpError::Protocol { address: self.address.to_string(), detail: error.to_string() }
            }
            ChannelError::Closed | ChannelError::Io(_) => self.closed(command),
        }
    }
}

/// Reads up to the greeting and answers with the version. What an earlier client left unread is
/// passed over: at most the end of one line, then whole answers and events.
fn greeting(
    address: &Address,
    channel: &mut LineChannel,
    deadline: Instant,
    timeout: Duration,
) -> Result<QemuVersion, QmpError> {
    let mut stale: Option<QmpError> = None;
    for index in 0..MAX_STALE_LINES {
        let line = match channel.read_line(deadline) {
            Ok(line) => line,
            // The line that could not be understood says more than that no other came.
            Err(error) => return Err(stale.unwrap_or_else(|| busy_or(address, timeout, error))),
        };
        match parse(address, &line) {
            Ok(message) if message.get("QMP").is_some() => {
                return version_of(&message).ok_or_else(|| QmpError::Protocol {
                    address: address.to_string(),
                    detail: format!("the greeting is {}", shorten(&message.to_string())),
                });
            }
            Ok(message)
                if ["return", "error", "event"].iter().any(|key| message.get(key).is_some()) => {}
            Ok(message) => {
                return Err(QmpError::Protocol {
                    address: address.to_string(),
                    detail: format!("the greeting is {}", shorten(&message.to_string())),
                });
            }
            Err(error) if index == 0 => stale = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(QmpError::Protocol {
        address: address.to_string(),
        detail: format!("{MAX_STALE_LINES} lines came, but no greeting"),
    })
}

fn busy_or(address: &Address, timeout: Duration, error: ChannelError) -> QmpError {
    match error {
        ChannelError::Timeout => QmpError::Timeout {
            address: address.to_string(),
            command: "the connection (another program may hold this monitor, which serves one client at a time)".into(),
            timeout_ms: milliseconds(timeout),
        },
        ChannelError::LineTooLong => QmpError::Protocol {
            address: address.to_string(),
            detail: error.to_string(),
        },
        ChannelError::Closed => QmpError::Closed {
            address: address.to_string(),
            command: "the greeting".into(),
        },
        ChannelError::Io(source) => QmpError::Connect {
            address: address.to_string(),
            source,
        },
    }
}

fn parse(address: &Address, line: &[u8]) -> Result<Value, QmpError> {
    match serde_json::from_slice::<Value>(line) {
        Ok(value) if value.is_object() => Ok(value),
        _ => Err(QmpError::Protocol {
            address: address.to_string(),
            detail: format!("it sent {}", shorten(&String::from_utf8_lossy(line))),
        }),
    }
}

fn refused(command: &str, error: &Value) -> QmpError {
    let text = |key: &str| error[key].as_str().unwrap_or("unknown").to_owned();
    QmpError::Refused {
        command: command.into(),
        class: text("class"),
        description: one_line(&text("desc")),
    }
}

fn version_of(greeting: &Value) -> Option<QemuVersion> {
    let version = &greeting["QMP"]["version"]["qemu"];
    Some(QemuVersion {
        major: version["major"].as_u64()?,
        minor: version["minor"].as_u64()?,
        micro: version["micro"].as_u64()?,
    })
}

/// Whole milliseconds of a duration.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Text from a peer, cut for an error message.
pub(crate) fn shorten(text: &str) -> String {
    const MAX_CHARS: usize = 120;
    let mut short: String = text.chars().take(MAX_CHARS).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        short.push('…');
    }
    format!("{short:?}")
}

/// Text from a peer on one line.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
