# SPDX-License-Identifier: MIT
include_guard()
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/sluice)

install(TARGETS sluice sluice_cuda EXPORT sluiceTargets FILE_SET HEADERS)
install(EXPORT sluiceTargets NAMESPACE sluice:: DESTINATION ${package_dir})
if(found_onednn)
  install(FILES cmake/FindoneDNN.cmake DESTINATION ${package_dir})
endif()
if(TARGET sluice_io)
  install(TARGETS sluice_io EXPORT sluiceIoTargets FILE_SET HEADERS)
  install(EXPORT sluiceIoTargets NAMESPACE sluice:: DESTINATION ${package_dir})
  install(FILES cmake/FindPCRE2.cmake cmake/Findutf8proc.cmake DESTINATION ${package_dir})
endif()
if(TARGET sluice_audio)
  install(TARGETS sluice_audio EXPORT sluiceAudioTargets FILE_SET HEADERS)
  install(EXPORT sluiceAudioTargets NAMESPACE sluice:: DESTINATION ${package_dir})
  install(FILES cmake/FindSndFile.cmake DESTINATION ${package_dir})
endif()

configure_package_config_file(
  cmake/sluiceConfig.cmake.in ${PROJECT_BINARY_DIR}/sluiceConfig.cmake
  INSTALL_DESTINATION ${package_dir}
  NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change the interface. Headers fit any architecture.
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/sluiceConfigVersion.cmake
  COMPATIBILITY SameMinorVersion
  ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/sluiceConfig.cmake
              ${PROJECT_BINARY_DIR}/sluiceConfigVersion.cmake
        DESTINATION ${package_dir})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
