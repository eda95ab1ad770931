//! How to get at agents: the options on the command line, in the environment and in settings files.

use clap::{Args, ValueHint};
use std::io::Read;
use std::path::PathBuf;
use vmtide_engine::agent::{AgentError, AgentKey, AgentOptions, AgentUrl, Fingerprint};
use vmtide_engine::hyperv::HypervUrl;
use vmtide_engine::{EngineError, Result};
use zeroize::Zeroizing;

/// The variable that holds the key.
const KEY_VARIABLE: &str = "VMTIDE_AGENT_KEY";

/// The most bytes of a key file; more is another file by mistake.
const MAX_KEY_FILE_BYTES: u64 = 64 << 10;

/// How to get at the disks of agents. The key comes from a file or the environment, never from the command line, which
/// every user of the machine can read.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Agents (agent+https://, hyperv://)")]
pub struct AgentAccessArgs {
    /// The file with the agent's key [default: the key in VMTIDE_AGENT_KEY]
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_AGENT_KEY_FILE")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath)]
    agent_key_file: Option<PathBuf>,
    /// The SHA-256 of the agent's certificate, as it prints it at its start
    #[arg(long, global = true, value_name = "SHA256", env = "VMTIDE_AGENT_FINGERPRINT")]
    #[arg(hide_env_values = true, value_parser = parse_fingerprint)]
    agent_fingerprint: Option<Fingerprint>,
    /// The authorities of agents' certificates (PEM) [default: those of the system]
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_AGENT_CA_FILE")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath)]
    agent_ca_file: Option<PathBuf>,
    /// Have disks compressed on the way, for lines slower than some 2 Gbit/s
    #[arg(long, global = true, env = "VMTIDE_AGENT_COMPRESS", hide_env_values = true)]
    agent_compress: bool,
}

fn parse_fingerprint(text: &str) -> std::result::Result<Fingerprint, String> {
    text.parse().map_err(|error: AgentError| error.to_string())
}

impl AgentAccessArgs {
    /// The options, with the key, where `source` is an agent's; otherwise none of them is looked at.
    ///
    /// # Errors
    /// Where the key cannot be read, or is none.
    pub fn options(&self, source: &str) -> Result<AgentOptions> {
        if !AgentUrl::is_agent_url(source) && !HypervUrl::is_hyperv_url(source) {
            return Ok(AgentOptions::default());
        }
        Ok(AgentOptions {
            key: self.key()?,
            fingerprint: self.agent_fingerprint,
            ca_file: self.agent_ca_file.clone(),
            compress: self.agent_compress,
            ..AgentOptions::default()
        })
    }

    fn key(&self) -> Result<Option<AgentKey>> {
        let text = match (&self.agent_key_file, std::env::var(KEY_VARIABLE)) {
            (Some(path), _) => {
                let io =
                    |error| EngineError::io(format!("read the key file {}", path.display()), error);
                let mut text = Zeroizing::new(String::new());
                let file = std::fs::File::open(path).map_err(io)?;
                file.take(MAX_KEY_FILE_BYTES).read_to_string(&mut text).map_err(io)?;
                text
            }
            (None, Ok(text)) => Zeroizing::new(text),
            (None, Err(std::env::VarError::NotPresent)) => return Ok(None),
            (None, Err(_)) => {
                return Err(EngineError::usage(format!("{KEY_VARIABLE} is not UTF-8")));
            }
        };
        Ok(Some(AgentKey::new(&text)?))
    }
}
