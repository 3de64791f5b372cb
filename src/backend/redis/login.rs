//! Who comes in.

use std::sync::{Mutex, PoisonError};

use redis::{ProtocolVersion, RedisConnectionInfo};

use super::options::RedisUrl;
use crate::error::Result;

/// User, password and database. What stands in files is read anew for each connection, as passwords are changed.
pub(super) struct Login {
    url: RedisUrl,
    /// As it was read last.
    last: Mutex<RedisConnectionInfo>,
}

impl Login {
    /// # Errors
    /// `NotFound`, `Denied` or `InvalidInput` for the files with the secrets.
    pub(super) fn new(url: &RedisUrl) -> Result<Self> {
        Ok(Login {
            url: url.clone(),
            last: Mutex::new(read(url)?),
        })
    }

    /// As it is now.
    pub(super) fn read(&self) -> RedisConnectionInfo {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read(&self.url) {
            // A file that is being written is empty for a moment.
            Ok(login) if login.password().is_some() || last.password().is_none() => *last = login,
            Ok(_) => {}
            // What that means the server says.
            Err(error) => log::debug!("{error}; what it said before is used"),
        }
        last.clone()
    }
}

fn read(url: &RedisUrl) -> Result<RedisConnectionInfo> {
    let credentials = url.broker.credentials()?;
    let mut login = RedisConnectionInfo::default()
        .set_protocol(ProtocolVersion::RESP3)
        .set_lib_name("dnpipes", env!("CARGO_PKG_VERSION"))
        .set_db(url.database);
    if let Some(user) = credentials.user {
        login = login.set_username(user);
    }
    if let Some(password) = credentials.password {
        login = login.set_password(password);
    }
    Ok(login)
}
