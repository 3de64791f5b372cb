//! Two hosts on one machine: network namespaces, and a cable between them that can be cut.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::finish;

/// Two hosts: network namespaces joined by a cable.
pub(crate) struct Hosts {
    pub(crate) near: String,
    pub(crate) far: String,
}

fn ip(words: &str) {
    let output = finish(Command::new("ip").args(words.split(' ')));
    assert!(output.status.success(), "ip {words}: {output:?}");
}

impl Hosts {
    /// The address of the far host.
    pub(crate) const FAR: &'static str = "10.77.0.1";

    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = format!("dnp{}x{count}", std::process::id());
        let hosts = Hosts {
            near: format!("{id}n"),
            far: format!("{id}f"),
        };
        let Hosts { near, far } = &hosts;
        for host in [near, far] {
            ip(&format!("netns add {host}"));
            ip(&format!("-n {host} link set lo up"));
        }
        ip(&format!(
            "-n {near} link add v0 type veth peer name v0 netns {far}"
        ));
        ip(&format!("-n {far} addr add {}/24 dev v0", Self::FAR));
        ip(&format!("-n {near} addr add 10.77.0.2/24 dev v0"));
        for host in [near, far] {
            ip(&format!("-n {host} link set v0 up"));
        }
        hosts
    }

    /// A program in front of one that runs on a host: in its network, with everybody's mounts.
    pub(crate) fn on(host: &str) -> [String; 2] {
        ["nsenter".to_owned(), format!("--net=/run/netns/{host}")]
    }

    /// Cuts the cable: what arrives on the near host is dropped, or refused.
    pub(crate) fn cut(&self, target: &str) {
        self.rule("-A", target);
    }

    pub(crate) fn heal(&self, target: &str) {
        self.rule("-D", target);
    }

    pub(crate) fn rule(&self, action: &str, target: &str) {
        for (host, chain) in [(&self.near, "INPUT"), (&self.near, "OUTPUT")] {
            let [nsenter, net] = Self::on(host);
            let mut command = Command::new(nsenter);
            command
                .arg(net)
                .args(["iptables", "-w", action, chain, "-p", "tcp", "-j"])
                .args(target.split(' '));
            let output = finish(&mut command);
            assert!(output.status.success(), "{output:?}");
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in [&self.near, &self.far] {
            Command::new("ip")
                .args(["netns", "del", host])
                .stderr(Stdio::null())
                .status()
                .ok();
        }
    }
}
