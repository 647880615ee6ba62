//! The operator's program that puts and takes away TXT records (RFC 8555 8.4).
//!
//! It is called with its own arguments, then `present` or `cleanup`, the record's name and its value; no shell reads any
//! of them. When `present` ends well the record must be there to see. A name and its wildcard have their records in one
//! place, so the program adds one beside what is there, and takes away the one of that value.

use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use selvage_certs::{FileError, IssuedFiles};
use selvage_config::node::Acme as Settings;
use tokio::io::{AsyncReadExt, sink};
use tokio::process::Command;

use crate::release::origin::chain;

/// Bytes of what the program says to its standard error that are told.
const SAID_BYTES_MAX: u64 = 2_048;

/// Why a record was not put, or not taken away.
#[derive(Debug, thiserror::Error)]
pub(super) enum HookError {
    /// No program is named.
    #[error("no program puts records")]
    Missing,
    /// The program does not start.
    #[error("start {program}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It ended badly.
    #[error("{program} {action}: {status}: {said}")]
    Failed {
        /// The program.
        program: PathBuf,
        /// What it should do.
        action: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        said: String,
    },
    /// What is to be taken away can't be noted.
    #[error(transparent)]
    Note(#[from] FileError),
    /// It did not end.
    #[error("{program} {action} did not end in {most:?}")]
    Slow {
        /// The program.
        program: PathBuf,
        /// What it should do.
        action: &'static str,
        /// How long it had.
        most: Duration,
    },
}

/// A record of one challenge.
pub(super) struct Record {
    name: String,
    value: String,
}

impl Record {
    /// Has the record put. That it will be is noted first: who is stopped meanwhile takes it away at the next start.
    pub(super) async fn put(
        settings: &Settings,
        files: &IssuedFiles,
        host: &str,
        value: String,
    ) -> Result<Self, HookError> {
        let record = Self { name: format!("_acme-challenge.{host}"), value };
        files.note_record(&record.name, &record.value)?;
        if let Err(error) = record.call(settings, "present").await {
            // What a program that failed has left there is its own; one that was cut off has not had its say.
            if !matches!(error, HookError::Slow { .. }) {
                files.forget_record(&record.name, &record.value)?;
            }
            return Err(error);
        }
        Ok(record)
    }

    /// Has it taken away.
    pub(super) async fn take_away(self, settings: &Settings, files: &IssuedFiles) -> Result<(), HookError> {
        self.call(settings, "cleanup").await?;
        Ok(files.forget_record(&self.name, &self.value)?)
    }

    /// Has those taken away that stood when the node was stopped.
    pub(super) async fn take_all_away(settings: &Settings, files: &IssuedFiles) {
        let records = files.records().unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "notes of records can't be read");
            Vec::new()
        });
        for (name, value) in records {
            let record = name.clone();
            match (Self { name, value }).take_away(settings, files).await {
                Ok(()) => tracing::info!(record, "record of a challenge that stood when the node was stopped is gone"),
                Err(error) => tracing::warn!(record, error = chain(&error), "record of a challenge stays"),
            }
        }
    }

    async fn call(&self, settings: &Settings, action: &'static str) -> Result<(), HookError> {
        let (program, arguments) = settings.dns_hook().ok_or(HookError::Missing)?;
        let most = Duration::from_millis(settings.dns_hook_ms);
        let mut command = Command::new(program);
        command.args(arguments).args([action, &self.name, &self.value]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let program = || program.to_owned();
        let mut child = command.spawn().map_err(|source| HookError::Start { program: program(), source })?;
        let mut said = Vec::new();
        let running = async {
            if let Some(stderr) = &mut child.stderr {
                // What it says is only told; a pipe that breaks breaks nothing.
                let _ = stderr.take(SAID_BYTES_MAX).read_to_end(&mut said).await;
                let _ = tokio::io::copy(stderr, &mut sink()).await;
            }
            child.wait().await
        };
        let status = tokio::time::timeout(most, running).await;
        let status = status.map_err(|_| HookError::Slow { program: program(), action, most })?;
        let status = status.map_err(|source| HookError::Start { program: program(), source })?;
        if status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        Err(HookError::Failed { program: program(), action, status, said })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(script: &str, most: u64) -> Settings {
        let text = format!(
            "directory = 'https://ca.test'\nterms_agreed = true\nnames = ['a.test']\nchallenge = 'dns-01'\n\
             dns_hook = ['/bin/sh', '-c', '{script}', 'hook', '$(touch x) \"']\ndns_hook_ms = {most}"
        );
        toml::from_str(&text).unwrap()
    }

    fn files(dir: &tempfile::TempDir) -> IssuedFiles {
        let files = IssuedFiles::at(dir.path(), "https://ca.test");
        files.make().unwrap();
        files
    }

    #[tokio::test]
    async fn a_record_is_put_and_taken_away_by_arguments_that_no_shell_reads() {
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("told");
        let script = format!("for it in \"$@\"; do echo \"$it\" >> {}; done; echo much >&2", told.display());
        let (settings, files) = (settings(&script, 60_000), files(&dir));
        let record = Record::put(&settings, &files, "a.test", "v;al $ue".into()).await.unwrap();
        assert_eq!(files.records().unwrap().len(), 1);
        record.take_away(&settings, &files).await.unwrap();
        assert_eq!(files.records().unwrap(), []);
        let call = |action: &str| format!("$(touch x) \"\n{action}\n_acme-challenge.a.test\nv;al $ue\n");
        assert_eq!(std::fs::read_to_string(&told).unwrap(), call("present") + &call("cleanup"));
    }

    #[tokio::test]
    async fn a_program_that_fails_or_stays_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(&dir);
        let put = async |script: &'static str, most| {
            Record::put(&settings(script, most), &files, "a.test", "x".into()).await.map(drop).unwrap_err()
        };
        let failed = put("echo no zone >&2; exit 3", 60_000).await.to_string();
        assert!(failed.contains("exit status: 3: no zone"), "{failed}");
        let much = put("yes | head -c 1000000 >&2; exit 1", 60_000).await.to_string();
        assert!(much.len() < 4_096, "{}", much.len());
        assert!(matches!(put("sleep 60", 50).await, HookError::Slow { .. }));
        assert_eq!(files.records().unwrap().len(), 1, "who was cut off may have put it");
        Record::take_all_away(&settings("exit 1", 60_000), &files).await;
        assert_eq!(files.records().unwrap().len(), 1);
        Record::take_all_away(&settings("exit 0", 60_000), &files).await;
        assert_eq!(files.records().unwrap(), []);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let text = "directory = 'https://ca.test'\ndns_hook = ['/nowhere/hook']";
        let settings: Settings = toml::from_str(text).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = Record::put(&settings, &files(&dir), "a.test", "x".into()).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("/nowhere/hook"), "{error}");
    }
}
