//! Files of passwords, tokens, seeds and credentials: read at the start, and anew for each connection.

use std::io::Read as _;
use std::path::Path;

/// Bytes of such a file, at most.
const SECRET_BYTES_MAX: u64 = 16 * 1024;

/// What stands in it, without the end of its last line.
pub(crate) fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(std::io::Error::other(format!("the file is larger than {SECRET_BYTES_MAX} bytes")));
    }
    Ok(text.trim().to_owned())
}

/// The same off the threads that serve. The error names the file and not what is in it.
pub(crate) async fn read_aside(path: &Path) -> Result<String, String> {
    let path = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || read(&path).map_err(|e| format!("read {}: {e}", path.display())));
    reading.await.unwrap_or_else(|_| Err("the read of a file ended early".into()))
}
