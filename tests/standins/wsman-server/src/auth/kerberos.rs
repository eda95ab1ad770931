//! Kerberos: a process of Python that holds MIT's library, one for the whole server.

use crate::options::Kerberos;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The program; it is given to the interpreter as an argument.
const ACCEPTOR: &str = include_str!("acceptor.py");

/// The process.
pub struct Acceptor {
    pipes: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    child: Mutex<Child>,
    next: AtomicU64,
}

/// One client's context in the process.
pub struct Context {
    acceptor: Arc<Acceptor>,
    id: u64,
}

/// What a token led to.
pub struct Step {
    /// The answer to the client.
    pub token: Option<Vec<u8>>,
    /// Who it is, once that is known.
    pub user: Option<String>,
    /// Whether messages can be sealed.
    pub sealed: bool,
    /// Whether the client sent the right binding.
    pub bound: bool,
}

impl Acceptor {
    /// Starts it.
    ///
    /// # Errors
    /// Where the interpreter cannot be run or has no `gssapi`.
    pub fn start(options: &Kerberos) -> std::io::Result<Arc<Self>> {
        let mut command = Command::new(&options.python);
        command.arg("-u").arg("-c").arg(ACCEPTOR);
        command.env("KRB5_KTNAME", &options.keytab).env("KRB5RCACHENAME", "none:");
        if let Some(config) = &options.config {
            command.env("KRB5_CONFIG", config);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let missing = || std::io::Error::other("the acceptor has no pipes");
        let stdin = child.stdin.take().ok_or_else(missing)?;
        let stdout = child.stdout.take().ok_or_else(missing)?;
        let acceptor = Arc::new(Self {
            pipes: Mutex::new((stdin, BufReader::new(stdout))),
            child: Mutex::new(child),
            next: AtomicU64::new(0),
        });
        // It answers at once, or it is not there.
        acceptor
            .call(&json!({ "op": "forget", "id": 0 }))
            .map_err(|why| std::io::Error::other(format!("Kerberos is not available: {why}")))?;
        Ok(acceptor)
    }

    /// A context for a new client.
    pub fn context(self: &Arc<Self>) -> Context {
        Context { acceptor: self.clone(), id: self.next.fetch_add(1, Ordering::Relaxed) + 1 }
    }

    fn call(&self, request: &Value) -> Result<Value, String> {
        let mut pipes = self.pipes.lock();
        let (stdin, stdout) = &mut *pipes;
        writeln!(stdin, "{request}").map_err(|error| error.to_string())?;
        let mut line = String::new();
        stdout.read_line(&mut line).map_err(|error| error.to_string())?;
        let answer: Value =
            serde_json::from_str(&line).map_err(|_| "the acceptor ended".to_owned())?;
        match answer.get("error").and_then(Value::as_str) {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer),
        }
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        let mut child = self.child.lock();
        // It may have ended already.
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Context {
    /// Takes a token of the client. `binding` is the application data of the channel's binding.
    ///
    /// # Errors
    /// Why it is refused, in the library's words.
    pub fn step(&self, token: &[u8], binding: Option<&[u8]>) -> Result<Step, String> {
        let answer = self.acceptor.call(&json!({
            "op": "step",
            "id": self.id,
            "token": BASE64_STANDARD.encode(token),
            "binding": binding.map(|data| BASE64_STANDARD.encode(data)),
        }))?;
        let token = match answer.get("token").and_then(Value::as_str) {
            Some(text) => Some(decode(text)?),
            None => None,
        };
        let truth = |name: &str| answer.get(name).and_then(Value::as_bool).unwrap_or(false);
        let user = answer.get("user").and_then(Value::as_str).map(str::to_owned);
        Ok(Step { token, user, sealed: truth("sealed"), bound: truth("bound") })
    }

    /// Seals a message: header, data, and by how many bytes the data is longer.
    ///
    /// # Errors
    /// What the library says.
    pub fn wrap(&self, plain: &[u8]) -> Result<(Vec<u8>, Vec<u8>, usize), String> {
        let answer = self.acceptor.call(&json!({
            "op": "wrap",
            "id": self.id,
            "data": BASE64_STANDARD.encode(plain),
        }))?;
        let padding = answer.get("padding").and_then(Value::as_u64).unwrap_or(0);
        let padding = usize::try_from(padding).map_err(|error| error.to_string())?;
        Ok((member(&answer, "header")?, member(&answer, "data")?, padding))
    }

    /// Opens a sealed message.
    ///
    /// # Errors
    /// What the library says.
    pub fn unwrap(&self, header: &[u8], sealed: &[u8]) -> Result<Vec<u8>, String> {
        let answer = self.acceptor.call(&json!({
            "op": "unwrap",
            "id": self.id,
            "header": BASE64_STANDARD.encode(header),
            "data": BASE64_STANDARD.encode(sealed),
        }))?;
        member(&answer, "data")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Where the process has ended there is nothing to forget.
        let _ = self.acceptor.call(&json!({ "op": "forget", "id": self.id }));
    }
}

fn member(answer: &Value, name: &str) -> Result<Vec<u8>, String> {
    decode(answer.get(name).and_then(Value::as_str).unwrap_or_default())
}

fn decode(text: &str) -> Result<Vec<u8>, String> {
    BASE64_STANDARD.decode(text).map_err(|error| error.to_string())
}
