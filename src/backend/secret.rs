//! What must not stand on a command line: from the environment, or from a file that it names.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::error::{Error, Kind, Result};

/// The files that variables name, as they were found first.
static NAMED: LazyLock<Mutex<HashMap<OsString, Named>>> = LazyLock::new(Mutex::default);

#[derive(Clone)]
struct Named {
    /// Absolute: a daemon changes its directory.
    path: PathBuf,
    /// What was in it, where it cannot be read again, as in a FIFO: who tries waits for whoever writes.
    once: Option<Vec<u8>>,
}

/// The value of the variable `name`, or the text of the file that `name` and `_FILE` names; without the
/// white space around it. `None` where neither says anything.
///
/// # Errors
/// `NotFound`, `Denied` or `InvalidInput` for the file.
pub(super) fn from_environment(name: &str) -> Result<Option<String>> {
    let text = match std::env::var(name) {
        Ok(text) => text,
        Err(_) => {
            let Some(path) = std::env::var_os(format!("{name}_FILE")) else {
                return Ok(None);
            };
            String::from_utf8(read_named(path)?).map_err(|_| {
                let why = format!("the file that {name}_FILE names is not text");
                Error::new(Kind::InvalidInput, why)
            })?
        }
    };
    Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty()))
}

/// The bytes of a file that a variable names, as they are now.
fn read_named(name: OsString) -> Result<Vec<u8>> {
    let known = {
        let files = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
        files.get(&name).cloned()
    };
    match known {
        Some(Named {
            once: Some(bytes), ..
        }) => Ok(bytes),
        Some(Named { path, once: None }) => read(&path),
        None => {
            let path = Path::new(&name);
            let path = std::path::absolute(path)
                .map_err(|error| Error::io(path.display().to_string(), error))?;
            let bytes = read(&path)?;
            let once = (!path.is_file()).then(|| bytes.clone());
            let mut files = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
            files.insert(name, Named { path, once });
            Ok(bytes)
        }
    }
}

/// A file's bytes; it is named where it cannot be read.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::io(path.display().to_string(), error))
}
