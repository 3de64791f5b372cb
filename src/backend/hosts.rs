//! Which servers a broker's URL means: those that it names, or those that DNS names (SRV records,
//! [RFC 2782](https://www.rfc-editor.org/rfc/rfc2782)).

use std::fmt;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;

use crate::error::{Error, Kind, Result};

/// How long a name server is given, for each of two tries.
const PATIENCE: Duration = Duration::from_secs(2);

/// A server: its name or address, and its port.
pub(super) type Host = (String, u16);

/// Where a broker's servers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hosts {
    /// Named in the URL; at least one.
    Named(Vec<Host>),
    /// Looked up at every connection, so that servers can come and go.
    Service {
        /// The domain of the URL.
        domain: String,
        /// The service's name, without its underscore.
        service: &'static str,
    },
}

impl Hosts {
    /// Reads `host[:port][,host:port…]`, or, for a `service`, the domain that has its records.
    pub(super) fn parse(
        text: &str,
        port: u16,
        service: Option<&'static str>,
    ) -> Result<Self, String> {
        if let Some(service) = service {
            if text.is_empty() || text.contains([',', ':', '[']) {
                return Err("+srv takes one domain, and no port".to_owned());
            }
            let domain = text.to_owned();
            return Ok(Hosts::Service { domain, service });
        }
        let hosts = text.split(',').map(|host| parse_host(host, port));
        hosts.collect::<Result<_, _>>().map(Hosts::Named)
    }

    /// The servers, in the order in which they are to be tried.
    ///
    /// # Errors
    /// `Unreachable` where DNS knows none, or cannot be asked.
    pub(super) async fn resolve(&self) -> Result<Vec<Host>> {
        match self {
            Hosts::Named(hosts) => Ok(hosts.clone()),
            Hosts::Service { domain, service } => {
                // Who names a service's records as they are called means those.
                if domain.starts_with('_') {
                    return look_up(domain).await;
                }
                match look_up(&format!("_{service}._tcp.{domain}")).await {
                    Ok(hosts) => Ok(hosts),
                    // Consul and others have the records at the name itself.
                    Err(error) => look_up(domain).await.map_err(|_| error),
                }
            }
        }
    }
}

impl fmt::Display for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hosts::Service { domain, .. } => f.write_str(domain),
            Hosts::Named(hosts) => {
                for (at, (host, port)) in hosts.iter().enumerate() {
                    let comma = if at == 0 { "" } else { "," };
                    match host.contains(':') {
                        true => write!(f, "{comma}[{host}]:{port}")?,
                        false => write!(f, "{comma}{host}:{port}")?,
                    }
                }
                Ok(())
            }
        }
    }
}

/// `host`, `host:port`, `[address]` or `[address]:port`.
fn parse_host(text: &str, default: u16) -> Result<Host, String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("a [ without its ]")?;
            let port = match rest {
                "" => None,
                rest => Some(rest.strip_prefix(':').ok_or("what follows ] is no port")?),
            };
            (host, port)
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    if host.is_empty() {
        return Err("it names no host".to_owned());
    }
    let port = match port {
        None => default,
        Some(port) => match port.parse() {
            Ok(port) if port > 0 => port,
            _ => return Err(format!("{port:?} is not a port")),
        },
    };
    Ok((host.to_owned(), port))
}

async fn look_up(name: &str) -> Result<Vec<Host>> {
    let failed = |why: String| {
        Error::new(
            Kind::Unreachable,
            format!("looking up the servers of {name} (DNS SRV)"),
        )
        .caused_by(why)
    };
    let mut builder = TokioResolver::builder_tokio().map_err(|error| failed(error.to_string()))?;
    let options = builder.options_mut();
    options.timeout = PATIENCE;
    options.attempts = 2;
    // Each connection asks anew.
    options.cache_size = 0;
    let resolver = builder.build().map_err(|error| failed(error.to_string()))?;
    let found = resolver.srv_lookup(name).await;
    let found = found.map_err(|error| failed(error.to_string()))?;
    let mut records = Vec::new();
    for record in found.answers() {
        if let RData::SRV(srv) = &record.data {
            // A single dot says that there is no such service.
            let target = srv.target.to_utf8();
            let target = target.trim_end_matches('.');
            if !target.is_empty() {
                records.push((srv.priority, srv.weight, (target.to_owned(), srv.port)));
            }
        }
    }
    if records.is_empty() {
        return Err(failed("there are no such servers".to_owned()));
    }
    Ok(in_order(records, random))
}

/// Lower priorities first; of one priority, drawn by weight.
fn in_order(mut records: Vec<(u16, u16, Host)>, draw: impl Fn(u64) -> u64) -> Vec<Host> {
    records.sort_by_key(|record| record.0);
    let mut ordered = Vec::new();
    while let Some(&(priority, ..)) = records.first() {
        let alike = records.partition_point(|record| record.0 == priority);
        // One more, so that a weight of 0 has a small chance too.
        let weights = records[..alike]
            .iter()
            .map(|record| u64::from(record.1) + 1);
        let mut at = draw(weights.clone().sum());
        let mut chosen = 0;
        for weight in weights {
            if at < weight {
                break;
            }
            at -= weight;
            chosen += 1;
        }
        ordered.push(records.remove(chosen).2);
    }
    ordered
}

/// A number below `end`; 0 where the system has no randomness, which is as good an order as any.
fn random(end: u64) -> u64 {
    getrandom::u64().map_or(0, |number| number % end.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_and_written() {
        let hosts = Hosts::parse("a,b:7000,[::1]:8000,[fe80::1]", 6379, None).expect("legal");
        assert_eq!(hosts.to_string(), "a:6379,b:7000,[::1]:8000,[fe80::1]:6379");
        for text in [
            "", ",", "a,", "a:", "a:0", "a:65536", ":1", "[::1", "[::1]x", "a:b",
        ] {
            assert!(Hosts::parse(text, 1, None).is_err(), "{text}");
        }
        assert!(Hosts::parse("example.com", 1, Some("redis")).is_ok());
        for text in ["", "a:1", "a,b"] {
            assert!(Hosts::parse(text, 1, Some("redis")).is_err(), "{text}");
        }
    }

    #[test]
    fn lower_priorities_come_first_and_weights_count() {
        let host = |name: &str| (name.to_owned(), 1);
        let records = || {
            vec![
                (20, 0, host("late")),
                (10, 0, host("light")),
                (10, 9, host("heavy")),
            ]
        };
        let names = |draw: fn(u64) -> u64| {
            let hosts = in_order(records(), draw);
            hosts.into_iter().map(|host| host.0).collect::<Vec<_>>()
        };
        assert_eq!(names(|_| 0), ["light", "heavy", "late"]);
        assert_eq!(names(|end| end.min(2) - 1), ["heavy", "light", "late"]);
        assert_eq!(names(|end| end - 1), ["heavy", "light", "late"]);
    }
}
