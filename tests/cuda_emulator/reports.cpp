// The checker's findings as text, with places in the source.
#include <dlfcn.h>

#include <cstdio>
#include <set>
#include <utility>

#include "checker.hpp"

namespace hessreg::emulator {

namespace {

std::vector<Report> reports;
std::set<std::pair<std::string, Site>> reported;  // finding, site

std::string run_and_read(const std::string& command) {
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return output;
  char buffer[4096];
  while (const size_t count = std::fread(buffer, 1, sizeof buffer, pipe))
    output.append(buffer, count);
  pclose(pipe);
  return output;
}

std::vector<std::string> split_lines(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    std::string line = text.substr(begin, end - begin);
    lines.push_back(line.substr(0, line.find(" (discriminator")));
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return lines;
}

// The offset of the call in this module, as addr2line wants it.
std::string module_offset(const void* return_address) {
  Dl_info info{};
  dladdr(return_address, &info);
  const auto offset = static_cast<const char*>(return_address) - static_cast<char*>(info.dli_fbase);
  char text[32];
  std::snprintf(text, sizeof text, " 0x%zx", static_cast<size_t>(offset) - 1);
  return text;
}

}  // namespace

std::vector<std::string> source_lines(const std::vector<Site>& sites) {
  Dl_info module{};
  dladdr(&reports, &module);
  std::string command = "addr2line -s -e '" + std::string(module.dli_fname) + "'";
  bool any = false;
  for (const Site site : sites) {
    if (site.is_location() || !site.return_address()) continue;
    command += module_offset(site.return_address());
    any = true;
  }
  const auto lines = any ? split_lines(run_and_read(command)) : std::vector<std::string>{};
  std::vector<std::string> result;
  size_t next = 0;
  for (const Site site : sites) {
    if (site.is_location()) {
      result.push_back(describe(site.location()));
    } else if (!site.return_address() || next == lines.size()) {
      result.push_back("?");
    } else {
      result.push_back(lines[next++]);
    }
  }
  return result;
}

void report_once(Report report) {
  if (reported.emplace(report.finding, report.site).second) reports.push_back(std::move(report));
}

void report_fatal(std::string finding, Site site) {
  reports.push_back({.finding = std::move(finding),
                     .detail = "",
                     .site = site,
                     .thread = describe(current_fiber()),
                     .against = "",
                     .other_site = {}});
  abandon_launch();
}

std::string take_reports() {
  std::vector<Site> sites;
  for (const Report& report : reports) {
    sites.push_back(report.site);
    sites.push_back(report.other_site);
  }
  const std::vector<std::string> lines = source_lines(sites);
  std::string text;
  for (size_t i = 0; i < reports.size(); ++i) {
    const Report& report = reports[i];
    text += "\n  " + report.finding + report.detail;
    if (report.site != Site()) text += " at " + lines[2 * i];
    text += " by " + report.thread;
    if (!report.against.empty()) text += ", " + report.against + " at " + lines[2 * i + 1];
  }
  reports.clear();
  reported.clear();
  return text;
}

}  // namespace hessreg::emulator
